"""Activations, block by block: one stream of hidden states for each width that calibrates on its own, and the original's.

A block is called exactly as the model calls it: its arguments (masks, rotary embeddings, whatever an architecture passes) are
recorded once, on the first sequence, with every block standing in as an identity. All sequences have one length and no padding,
so these arguments serve for every sequence; only the hidden state differs.

A stream is what flows through the model when every layer before is read at that width. So each width meets its own drift, and
its Hessians are those of the inputs that it will see.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matquant.errors import InputError
from matquant.moments import Moments, add, as_of_all, of_all
from matquant.recipe import ORIGINAL
from matquant.world import ALONE, World


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # the hidden state is passed by name

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args, kwargs = self._arguments(block, hidden)
        return _first(block(*args, **kwargs))

    def takes_many(self, block: nn.Module, hidden: Float[Tensor, "samples length hidden"]) -> bool:
        """Whether several sequences may be passed at once: what was recorded for one serves for two, with the same result."""
        if len(hidden) < 2:
            return False
        with torch.inference_mode():
            alone = torch.cat([self(block, x[None]) for x in hidden[:2]])
            try:
                both = self(block, hidden[:2])
            except (RuntimeError, ValueError):  # a mask or a position that does not stretch
                return False
        return both.shape == alone.shape and torch.allclose(both, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().mean()))

    def with_weights(self, block: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The block's output with some of its parameters replaced, so that gradients reach these."""
        return _first(torch.func.functional_call(block, dict(weights), *self._arguments(block, hidden)))

    def _arguments(self, block: nn.Module, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = hidden.to(next(block.parameters()).device)  # it may lie in a file
        return (self.args, {**self.kwargs, "hidden_states": hidden}) if self.named else ((hidden, *self.args), self.kwargs)


def _first(result: Any) -> Tensor:
    """The hidden state among what a block returns."""
    return result[0] if isinstance(result, tuple) else result


class _Stop(Exception):
    """Raised inside a forward pass once all that was wanted has been seen."""


def record(
    model: nn.Module, blocks: nn.ModuleList, windows: Int[Tensor, "samples length"], device: torch.device
) -> tuple[list[Call], Float[Tensor, "samples length hidden"]]:
    """(how each block is called, the first block's inputs). Block 0 and all around it must hold real weights."""
    calls: list[Call] = []
    hidden: list[Tensor] = []
    tuples = False

    def enter(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            nonlocal tuples
            named = "hidden_states" in kwargs
            x = kwargs.pop("hidden_states") if named else args[0]
            rest = args if named else args[1:]
            if index == 0:
                hidden.append(x.detach())
                if calls:
                    raise _Stop
                result = original(*args, hidden_states=x, **kwargs) if named else original(*args, **kwargs)
                tuples = isinstance(result, tuple)
            calls.append(Call(rest, kwargs, named))
            if index == len(blocks) - 1:
                raise _Stop
            return (x, *[None] * 4) if tuples else x

        return stand_in

    originals = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = enter(index, originals[index])
        with torch.inference_mode():
            for window in windows:
                _run_until_stop(model, window[None].to(device))
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own
    return [Call(_own(call.args), _own(call.kwargs), call.named) for call in calls], torch.cat(hidden)


def _own(value: Any) -> Any:
    """The same value with tensors copied: those made in inference mode can take part in no training."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(part) for key, part in value.items()}
    return type(value)(_own(part) for part in value) if type(value) in (tuple, list) else value


def _run_until_stop(model: nn.Module, ids: Tensor) -> None:
    try:
        model(ids, use_cache=False)
    except _Stop:
        return
    raise InputError("the model never called its decoder blocks; its architecture cannot be walked block by block")


def like(hidden: Float[Tensor, "samples length hidden"], file: Path | None) -> Float[Tensor, "samples length hidden"]:
    """A copy of `hidden`: where it is, or mapped to `file`, so that the system may write it out when memory is short.

    Raises OSError where the disk is full: the file is written first, because a mapped page without a place on disk kills the process.
    """
    if file is None:
        return hidden.clone()
    with file.open("wb") as handle:
        for sample in hidden:
            handle.write(sample.contiguous().cpu().view(torch.uint8).numpy().data)
    return torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)


# --- statistics of a block's inputs ---------------------------------------------------------------------------------

ENOUGH = 4  # tokens an input channel, below which that map is noise
Weights = Mapping[str, Tensor]  # layer -> its weight as the module holds it


@dataclass(frozen=True)
class Inputs:
    """Second moments of one layer's inputs, by the width of the stream that they come from.

    h: H_r = mean of x_r x_r^T over tokens. cross: C_r = mean of (x - x_r) x_r^T, x from the original model; empty if not wanted.
    """

    h: Mapping[int, Float[Tensor, "in in"]]
    cross: Mapping[int, Float[Tensor, "in in"]] = field(default_factory=dict[int, Tensor])


def place(layers: Mapping[str, nn.Module], weights: Weights) -> None:
    """Let the layers compute with these weights; nothing is copied."""
    for name, weight in weights.items():
        layers[name].weight.data = weight


def stages(block: nn.Module, call: Call, hidden: Tensor, layers: Mapping[str, nn.Module]) -> list[list[list[str]]]:
    """The layers in the order in which a block calls them: stages of groups of layers.

    Layers that are handed the very same tensor (q, k, v; gate, up) are a group: they have one H. A later stage's inputs depend on
    an earlier stage's layers. Groups whose layers' names differ in numbers only (the experts of one kind) are one stage. Layers that no token reaches (`hidden` has none for them) come last, each alone.
    """
    groups: dict[str, list[str]] = {}
    seen: list[tuple[Tensor, str]] = []  # of the call under way; holding the tensor keeps its identity its own
    leader: dict[str, str] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in leader:
                leader[name] = next((other for tensor, other in seen if tensor is args[0]), name)
                groups.setdefault(leader[name], []).append(name)
            seen.append((args[0], leader[name]))

        return hook

    with _hooks(layers, observe), torch.inference_mode():
        for x in hidden:
            seen.clear()
            call(block, x[None])
            if len(leader) == len(layers):
                break
    seen.clear()
    by_kind: dict[tuple[str, ...], list[list[str]]] = {}
    for members in groups.values():
        by_kind.setdefault(tuple(re.sub(r"\.\d+\.", ".*.", name) for name in members), []).append(members)
    return [*by_kind.values(), *([[name]] for name in layers if name not in leader)]


@dataclass(frozen=True)
class Seen:
    """H of the original's inputs by leader: over all sequences, and over the first of them, which every stream holds; the same
    where these are all."""

    whole: Mapping[str, Float[Tensor, "in in"]] = field(default_factory=dict[str, Tensor])
    part: Mapping[str, Float[Tensor, "in in"]] = field(default_factory=dict[str, Tensor])


def pass_original(
    block: nn.Module,
    call: Call,
    hidden: Float[Tensor, "samples length hidden"],
    weights: Weights,
    layers: Mapping[str, nn.Module],
    leaders: Sequence[str] = (),
    first: int | None = None,
    world: World = ALONE,
) -> Seen:
    """Replace the original's hidden states by the block's outputs, in place. Returns moments of the `leaders` on the way.

    A leader that no token reaches is absent. first: how many sequences the other streams hold; None = all, in every process.
    """
    moments: dict[str, Moments] = {}
    early: dict[str, Moments] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = _tokens(args[0])
            add(moments, name, x, x)

        return hook

    place(layers, weights)
    with _hooks({name: layers[name] for name in leaders}, observe), torch.inference_mode():
        for sample, x in enumerate(hidden):
            hidden[sample] = call(block, x[None])[0]
            if sample + 1 == first:
                early = {name: replace(found, total=found.total.clone()) for name, found in moments.items()}
    device = next(block.parameters()).device
    whole, part = ({name: found.mean for name, found in of_all(seen, world, device).items()} for seen in (moments, early))
    return Seen(whole, part or whole)


def statistics(
    block: nn.Module,
    call: Call,
    streams: Mapping[int, Float[Tensor, "samples length hidden"]],
    weights: Mapping[int, Weights],
    layers: Mapping[str, nn.Module],
    leaders: Sequence[str],
    seen: Seen,
    original: Float[Tensor, "samples length hidden"] | None = None,
    world: World = ALONE,
) -> dict[str, Inputs]:
    """Inputs of the `leaders`, each stream run with its own weights up to the last of them. A leader that no token reaches is absent.

    streams, weights: by width. seen: of the original's stream. original: its hidden states before the block, of the sequences that
    the streams hold, where cross moments are wanted.
    """
    caught: dict[str, Tensor] = {}
    waiting: set[str] = set()

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught[name] = _tokens(args[0])
            waiting.discard(name)
            if not waiting:
                raise _Stop

        return hook

    def inputs(width: int, hidden: Tensor) -> dict[str, Tensor]:
        caught.clear()
        waiting.update(leaders)
        place(layers, weights[width])
        with suppress(_Stop):
            call(block, hidden[None])
        return dict(caught)

    h: dict[tuple[str, int], Moments] = {}
    c: dict[tuple[str, int], Moments] = {}
    with _hooks({name: layers[name] for name in leaders}, observe), torch.inference_mode():
        for sample in range(len(next(iter(streams.values()), ()))):
            originals = {} if original is None else inputs(ORIGINAL, original[sample])
            for width, hidden in streams.items():
                for name, x in inputs(width, hidden[sample]).items():
                    add(h, (name, width), x, x)
                    every = len(x) == hidden.shape[1]  # a router may send an expert other tokens than before
                    if every and name in originals and originals[name].shape == x.shape:
                        add(c, (name, width), originals[name] - x, x)
    h, c = (of_all(moments, world, next(block.parameters()).device) for moments in (h, c))
    return _inputs(leaders, list(streams), h, c, seen)


def _inputs(leaders: Sequence[str], streams: Sequence[int], h: Mapping[Any, Moments], c: Mapping[Any, Moments], seen: Seen) -> dict[str, Inputs]:
    """From moments by (leader, width); those of fewer sequences than the original's corrected by what these say of all."""
    widths = [*([ORIGINAL] if seen.whole else []), *streams]
    found: dict[str, Inputs] = {}
    for name in leaders:
        own = {width: h[name, width].mean for width in streams if (name, width) in h}
        cross = {width: c[name, width].mean for width in streams if (name, width) in c}
        part, whole = seen.part.get(name), seen.whole.get(name)
        for width in cross:
            if part is not None and whole is not None and part is not whole and c[name, width].tokens >= ENOUGH * len(part):
                own[width], cross[width] = as_of_all(own[width], cross[width], part, whole)
        if whole is not None:
            own = {ORIGINAL: whole, **own}
        if own:
            found[name] = Inputs(_complete(own, widths), cross)
    return found


def _tokens(x: Tensor) -> Float[Tensor, "tokens in"]:
    """A layer's input, a row a token."""
    return x.detach().reshape(-1, x.shape[-1]).float()


def _complete(h: dict[int, Tensor], widths: Sequence[int]) -> dict[int, Tensor]:
    """Where a router sent a layer no token in some stream, it takes the moments of another."""
    return {width: h.get(width, next(iter(h.values()))) for width in widths}


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(make(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def propagate(
    block: nn.Module,
    call: Call,
    streams: Mapping[int, Float[Tensor, "_ length hidden"]],
    weights: Mapping[int, Weights],
    layers: Mapping[str, nn.Module],
    goal: Float[Tensor, "_ length hidden"],
    world: World = ALONE,
) -> dict[int, float]:
    """Replace every stream's hidden states by the block's outputs, in place. Returns ||y_r - y||^2 / ||y||^2 of each width, if y is not 0.

    goal: y, the original's outputs, of at least as many sequences as a stream holds.
    """
    errors: dict[int, float] = {}
    with torch.inference_mode():
        for width, hidden in streams.items():
            place(layers, weights[width])
            power = error = 0.0
            for sample, x in enumerate(hidden):
                output, wanted = call(block, x[None])[0], goal[sample]
                wanted = wanted.to(output.device)
                power += wanted.double().square().sum().item()
                error += (output - wanted).double().square().sum().item()
                hidden[sample] = output
            power, error = world.total(power), world.total(error)
            if power > 0:
                errors[width] = error / power
    return errors
