"""A tiny model in training, for tests; as a script, one process of several: training.py FOLDER ddp|fsdp."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from matquant.codes import Grid, fit_grid, nearest_code
from matquant.joint import Joint
from matquant.train import Fit, Means, Schedule, Trained, whole
from matquant.trainable import TrainedLinear
from matquant.weight import NestedWeight
from matquant.world import World

GRID = Grid(8, 16, symmetric=False, overlap=False)
SCHEDULE = Schedule(steps=6, batch=4, slice_size=1, warmup=2, decay="cosine", clip=1.0, save_every=4)
LENGTH = 12


def small_model() -> tuple[Any, dict[str, nn.Module]]:
    """(model, its layers in training), the same each time. Reads of 4 and 2 bits are learned, so that no pass uses all parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    layers: dict[str, nn.Module] = {}
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        w = module.weight.detach().clone()
        grouped = w.reshape(len(w), -1, GRID.group_size)
        s, z = fit_grid(grouped, GRID, torch.float16)
        assert z is not None
        codes = nearest_code(grouped / s[..., None] + z[..., None], GRID).reshape(w.shape)
        layers[name] = TrainedLinear(w, NestedWeight(codes, s.half(), z.to(torch.uint8), GRID, "floor"), (4, 2), narrowest=2, learn_scales=True)
        model.set_submodule(name, layers[name])
    return model, layers


def stream(length: int = LENGTH) -> Iterator[Tensor]:
    """Endless random tokens that follow each other in a way that can be learned."""
    g = torch.Generator().manual_seed(5)
    while True:
        yield (torch.randint(0, 64, (1,), generator=g) + 5 * torch.arange(length)) % 64


def fit_of(folder: Path, schedule: Schedule = SCHEDULE, accelerator: Accelerator | None = None, **changes: Any) -> Fit:
    model, layers = small_model()
    joint = replace(Joint(layers, {8: 0.1, 4: 0.1, 2: 1.0}, {2: 8}), **{k: v for k, v in changes.items() if hasattr(Joint, k)})
    others = {k: v for k, v in changes.items() if not hasattr(Joint, k)}
    group = {"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-2, "weight_decay": 0.0}
    run = Fit(model, [group], joint, stream, schedule, folder, folder / "log.jsonl", accelerator or means(folder).accelerator())
    return replace(run, **others)


def means(folder: Path) -> Means:
    return Means(torch.device("cpu"), torch.float32, folder, folder)


def codes(run: Fit) -> Tensor:
    """What the weights of all layers round to."""
    return torch.cat([whole(layer).frozen().codes.flatten() for layer in run.joint.layers.values()])  # pyright: ignore


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    accelerator = means(folder).accelerator()
    if kind == "fsdp":  # accelerate offers it on GPUs only; torch has it on CPUs as well
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    run = fit_of(folder, accelerator=accelerator)
    assert run.run() == Trained(SCHEDULE.steps, "")
    sharded = {type(p).__name__ for p in run.model.parameters()} == {"DTensor"}
    assert sharded is (kind == "fsdp")
    torch.save(codes(run), folder / f"codes-{accelerator.process_index}.pt")
    world = World(accelerator.process_index, accelerator.num_processes)
    world.wait()  # a process whose peer has gone already may abort in its threads
    world.leave()


if __name__ == "__main__":
    main()
