"""A model's blocks as a run walks them, for the tests of activations."""

from pathlib import Path

import torch
from torch import Tensor, nn

from matquant import activations, models
from matquant.activations import Inputs
from matquant.recipe import ORIGINAL, Recipe

CPU, F32 = torch.device("cpu"), torch.float32
Weights = dict[int, dict[str, Tensor]]
WINDOWS = (torch.arange(3 * 40).reshape(3, 40) * 37 + 11) % 250


class Walk:
    """One model's blocks, with what is recorded of them. Layers by their full names."""

    def __init__(self, folder: Path, windows: Tensor = WINDOWS) -> None:
        self.source = models.open_source(str(folder))
        self.layers = models.find_layers(self.source.model, Recipe(group_size=16))
        self.prefix, self.blocks = models.find_blocks(self.source.model)
        models.materialize_around(self.source, self.prefix, CPU, F32)
        for index, block in enumerate(self.blocks):
            models.materialize(self.source, block, f"{self.prefix}.{index}", CPU, F32)
        self.calls, self.hidden = activations.record(self.source.model, self.blocks, windows, CPU)

    def of_block(self, index: int) -> dict[str, nn.Module]:
        return {name: self.blocks[index].get_submodule(name.removeprefix(f"{self.prefix}.{index}.")) for name in self.layers.of_block(index)}

    def held(self, index: int) -> dict[str, Tensor]:
        return {name: layer.weight.data.clone() for name, layer in self.of_block(index).items()}


def every_stream(
    block: nn.Module, call: activations.Call, streams: dict[int, Tensor], weights: Weights, layers: dict[str, nn.Module], leaders: list[str]
) -> tuple[dict[str, Inputs], dict[int, float]]:
    """(inputs of the leaders, errors of the outputs) as a block's run asks for them: the original's stream goes first. Streams move on."""
    before = streams[ORIGINAL][: min(map(len, streams.values()))].clone()
    seen = activations.pass_original(block, call, streams[ORIGINAL], weights[ORIGINAL], layers, leaders)
    narrow = {r: x for r, x in streams.items() if r != ORIGINAL}
    found = activations.statistics(block, call, narrow, weights, layers, leaders, seen, before)
    return found, activations.propagate(block, call, narrow, weights, layers, streams[ORIGINAL])
