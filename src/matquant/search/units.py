"""Units: layers that engines fuse into one product, and which therefore take one width (vLLM: q/k/v, gate/up, the experts of a layer).

What is one unit follows from how a model computes, not from names: layers of one parent module that are handed the very same tensor, and layers
that stand at the same place in the members of one list inside a block (experts). The model is called once, as a skeleton: on the meta device, where
nothing is computed, or, if its code looks at values (a router does), with weights of zero that take no memory.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.plan import BitPlan

TOKENS = 2  # of the trial


@dataclass(frozen=True)
class Unit:
    """Layers with one width. block: its number in the list of blocks, by the first number in its name; -1 outside (a quantized head)."""

    layers: tuple[str, ...]
    block: int

    @property
    def label(self) -> str:
        """The last part of each layer's name, of experts once: q_proj/k_proj/v_proj."""
        return "/".join(dict.fromkeys(name.rpartition(".")[2] for name in self.layers))


@dataclass(frozen=True)
class Structure:
    """What a checkpoint's model computes, from one call.

    cache: of each block, (numbers that it keeps of a token, tokens at most or None). head: weights of an output head that is not stored quantized.
    """

    units: tuple[Unit, ...]
    cache: tuple[tuple[int, int | None], ...]
    head: int


def as_plan(units: Iterable[Unit], bits: Iterable[int]) -> BitPlan:
    """Units read at `bits`, one a unit. The most frequent width is the default."""
    given = {name: width for unit, width in zip(units, bits, strict=True) for name in unit.layers}
    used = list(given.values())
    default = max(sorted(set(used)), key=used.count)
    return BitPlan(default, {name: width for name, width in given.items() if width != default})


def separate(checkpoint: Checkpoint) -> tuple[Unit, ...]:
    """Every layer a unit of its own: for engines that fuse nothing."""
    return tuple(sorted((Unit((name,), _block(name)) for name in checkpoint.modules), key=lambda unit: unit.block))


def by_module(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """Units of one part of a block (its attention, its MLP) as one.

    A layer read at r bits was fitted to inputs that come from layers read at r bits, and most of all to those of its own part: o_proj to
    values, down_proj to gate and up. Read at different widths, they lose what they had been made to make up for.
    """
    merged: dict[tuple[int, str], list[str]] = {}
    for unit in units:
        merged.setdefault((unit.block, _part(unit.layers[0])), []).extend(unit.layers)
    return tuple(Unit(tuple(layers), block) for (block, _), layers in merged.items())


def _part(name: str) -> str:
    """h.3.attn.c_proj -> h.3.attn; h.3.fc1 -> h.3; a layer outside all blocks is a part of its own."""
    found = re.match(r"(.*?\.\d+)(\.[^.]+(?=\.))?", name)
    return name if found is None else found[0]


def examine(checkpoint: Checkpoint) -> Structure:
    """Raises InputError for a model that cannot be called."""
    skeleton = _skeleton(checkpoint)
    try:
        return _call(skeleton, checkpoint, torch.device("meta"))
    except Exception:  # noqa: BLE001 - whatever a model raises on the meta device, where values cannot be looked at
        _fill(skeleton)
    try:
        return _call(skeleton, checkpoint, torch.device("cpu"))
    except Exception as error:  # noqa: BLE001 - as above
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the model of {checkpoint.folder} cannot be tried out ({type(error).__name__}: {reason}); plan single layers") from None


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model without values. Raises InputError."""
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{checkpoint.folder} cannot be built from its config.json ({str(error).splitlines()[0]}); fetch it again") from None


def _fill(model: nn.Module) -> None:
    """Zeros in place of every parameter and buffer; pages that are only read take no memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _call(model: Any, checkpoint: Checkpoint, device: torch.device) -> Structure:
    paths = {_path(model, name): name for name in checkpoint.modules}
    seen: list[tuple[Tensor, str]] = []  # holding the tensors keeps their identities their own

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: seen.append((args[0], name))

    hooks = [model.get_submodule(path).register_forward_pre_hook(observe(name)) for path, name in paths.items()]
    try:
        with torch.inference_mode():
            ids = torch.zeros((1, TOKENS), dtype=torch.long, device=device)
            output = model(input_ids=ids, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    own = [model.get_submodule(path) for path in (*paths, *(_path(model, name) for name in checkpoint.tables))]
    free = head is not None and not any(module.weight is head.weight for module in own)
    return Structure(_group(list(checkpoint.modules), seen), _cache(output), head.weight.numel() if free else 0)


def _path(model: Any, name: str) -> str:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise InputError(f"the checkpoint quantizes {name}, which {type(model).__name__} does not have; config.json is of another model") from None
    return name


def _group(names: list[str], seen: list[tuple[Tensor, str]]) -> tuple[Unit, ...]:
    """Units by block, in the order of the first layer of each."""
    leader: dict[str, str] = {}
    for tensor, name in seen:
        parent = name.rpartition(".")[0]
        same = (other for found, other in seen if found is tensor and other.rpartition(".")[0] == parent)
        leader.setdefault(name, next(same))
    by_place: dict[str, str] = {}  # a place in a list inside a block -> the first layer there
    units: dict[str, list[str]] = {}
    for name in names:
        first = leader.get(name, name)
        place = _place(first)
        if place is not None:
            first = by_place.setdefault(place, first)
        units.setdefault(first, []).append(name)
    found = [Unit(tuple(members), _block(members[0])) for members in units.values()]
    return tuple(sorted(found, key=lambda unit: unit.block))


def _place(name: str) -> str | None:
    """h.3.mlp.experts.7.up -> h.3.mlp.experts: the list, for all experts share one width; None for a layer in no list inside its block."""
    found = re.match(r"(.*?\.\d+\..*?)\.\d+(\.|$)", name)
    return found[1] if found else None


def _block(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _cache(output: Any) -> tuple[tuple[int, int | None], ...]:
    """Of every block with keys and values: how many numbers a token leaves there, and the window if it has one."""
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or []
    found: list[tuple[int, int | None]] = []
    for layer in layers:
        tensors = [tensor for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(tensor, Tensor)]
        window = getattr(layer, "sliding_window", None)
        found.append((sum(tensor.numel() for tensor in tensors) // TOKENS, window if isinstance(window, int) else None))
    return tuple(found)
