"""KL of a whole model whose units are read at any widths, one evaluation after another, at the price of what changed.

The model is dense, every layer at its widest read. A switch puts another read of a few layers in their place. Blocks before the first of them compute
what they computed before, so a pass starts there, from the hidden states that were kept: half the blocks are saved on average.

With p the reference's distribution and z, z' its logits and the model's, position by position in float32:

    KL = log sum exp z' - log sum exp z - sum_v p_v (z'_v - z_v)        in nats; p and z are computed once

It is the model's own code that runs, with the earlier blocks standing in as identities; so nothing here knows an architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matquant import models
from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.plan import BitPlan
from matquant.search.units import Unit

BATCH_TOKENS = 256  # of a pass: enough to keep the products busy; one set of logits is held, and parts of a text can be asked for
KEPT_BYTES = 4 * 2**30  # of dense reads that are kept for the next time


@dataclass
class _Batch:
    """Some sequences. entries: the hidden states in front of every block, of the base. p, z, total: of the reference."""

    ids: Int[Tensor, "samples length"]
    entries: list[Tensor]
    p: Float[Tensor, "positions vocab"]
    z: Float[Tensor, "positions vocab"]
    total: Float[Tensor, " positions"]


class Probe:
    """A model under probing.

    units: that are switched. ids: the text; the last token of a sequence is predicted and predicts nothing. reference: the original model, loaded; None =
    the checkpoint's own widest read. Raises as from_pretrained.
    """

    def __init__(
        self, checkpoint: Checkpoint, units: Sequence[Unit], ids: Int[Tensor, "samples length"], reference: Any = None, *, device: str = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> None:  # fmt: skip
        from matquant import hf
        from matquant.evaluate import check_fits

        if ids.shape[0] < 1 or ids.shape[1] < 2:
            raise InputError(f"{ids.shape[0]} sequences of {ids.shape[1]} tokens predict nothing; give at least one of 2 tokens")
        self.checkpoint, self.units = checkpoint, list(units)
        self.widest = max(checkpoint.widths)
        self.model: Any = hf.from_pretrained(checkpoint.folder, self.widest, dtype=dtype, device_map=device).eval().dequantize()
        for fits in (self.model, *([] if reference is None else [reference])):
            check_fits(fits, ids)
        prefix = self.model.base_model_prefix
        known = dict(self.model.named_modules())
        names = {name: name if name in known else name.removeprefix(f"{prefix}.") for unit in self.units for name in unit.layers}
        self.layers: dict[str, Any] = {name: known[path] for name, path in names.items()}
        self.widths = {name: self.widest for name in self.layers}  # as they are now
        self._reads: dict[tuple[str, int], Tensor] = {(name, self.widest): layer.weight.data for name, layer in self.layers.items()}
        self._spare = KEPT_BYTES
        self.base: dict[str, int] = dict(self.widths)
        blocks_name, blocks = models.find_blocks(self.model)
        self.blocks: list[nn.Module] = list(blocks)
        inside = {id(module): i for i, block in enumerate(self.blocks) for module in block.modules()}
        self.first = [min(inside.get(id(self.layers[name]), len(self.blocks)) for name in unit.layers) for unit in self.units]
        self._start, self._entry, self._kept, self._tuples = 0, None, None, False
        self._wrap()
        self._batches = [self._batch(part, reference) for part in ids.split(max(1, BATCH_TOKENS // ids.shape[1]))]
        self._check_restart()

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _wrap(self) -> None:
        """Let every block stand aside in front of the one that a pass starts at."""

        def enter(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                named = "hidden_states" in kwargs
                x = kwargs["hidden_states"] if named else args[0]
                if index < self._start:
                    return (x, *[None] * 4) if self._tuples else x
                if index == self._start and self._entry is not None:
                    x = self._entry
                if self._kept is not None:
                    self._kept.append(x)
                result = original(*args, **{**kwargs, "hidden_states": x}) if named else original(x, *args[1:], **kwargs)
                self._tuples = isinstance(result, tuple)
                return result

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = enter(index, block.forward)

    def _logits(self, ids: Tensor, start: int = 0, entry: Tensor | None = None, kept: list[Tensor] | None = None) -> Float[Tensor, "positions vocab"]:
        self._start, self._entry, self._kept = start, entry, kept
        try:
            return self.model(ids[:, :-1].to(self.model.device), use_cache=False).logits.flatten(0, 1).float()
        finally:
            self._start, self._entry, self._kept = 0, None, None

    @torch.inference_mode()
    def _batch(self, ids: Tensor, reference: Any) -> _Batch:
        entries: list[Tensor] = []
        z = self._logits(ids, kept=entries)
        if len(entries) != len(self.blocks):
            raise InputError("the model does not call each of its decoder blocks once; it cannot be probed block by block")
        if reference is not None:
            z = reference(ids[:, :-1].to(reference.device), use_cache=False).logits.flatten(0, 1).float().to(z.device)
        if not z.isfinite().all():
            raise InputError("the reference's logits are not finite; try --dtype float32")
        return _Batch(ids, entries, z.softmax(-1), z, z.logsumexp(-1))

    @torch.inference_mode()
    def _check_restart(self) -> None:
        """A model whose blocks hand each other more than hidden states cannot be started in the middle: then every pass is whole."""
        batch, middle = self._batches[0], len(self.blocks) // 2
        want, got = self._logits(batch.ids), self._logits(batch.ids, middle, batch.entries[middle])
        if not torch.allclose(want, got, rtol=1e-4, atol=1e-4 * float(want.abs().max())):
            self.first = [0] * len(self.units)

    # --- what is asked ----------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        return sum(len(batch.ids) for batch in self._batches)

    @property
    def texts(self) -> list[Int[Tensor, "_ length"]]:
        """The sequences, in the batches that they pass in."""
        return [batch.ids for batch in self._batches]

    def kl(self, widths: Mapping[int, int], samples: int | None = None) -> Float[Tensor, " samples"]:
        """Of each sequence, in nats a token, with these units (by their numbers) at these widths and all others as in the base.

        samples: the first of them alone, in whole batches; None = all.
        """
        asked = {name: bits for unit, bits in widths.items() for name in self.units[unit].layers}
        wanted = self.base | asked
        starts = [self.first[i] for i, unit in enumerate(self.units) if any(wanted[name] != self.base[name] for name in unit.layers)]
        start = min(starts, default=len(self.blocks) - 1)
        self._set(wanted)
        found: list[Tensor] = []
        for batch in self._batches:
            if samples is None or sum(map(len, found)) < samples:
                found.append(self._kl_of(batch, min(start, len(self.blocks) - 1)))
        return torch.cat(found)

    @torch.inference_mode()
    def _kl_of(self, batch: _Batch, start: int) -> Float[Tensor, " samples"]:
        z = self._logits(batch.ids, start, batch.entries[start])
        total = z.logsumexp(-1)
        kl = total - batch.total - torch.einsum("nv,nv->n", batch.p, z.sub_(batch.z))
        if not kl.isfinite().all():
            raise InputError("the model's logits are not finite at these widths; try --dtype float32")
        return kl.reshape(len(batch.ids), -1).mean(1).cpu()

    @torch.inference_mode()
    def rebase(self, widths: Mapping[int, int]) -> None:
        """Start from these widths from now on: the reference stays, hidden states are computed anew."""
        self.base = self.base | {name: bits for unit, bits in widths.items() for name in self.units[unit].layers}
        self._set(self.base)
        for batch in self._batches:
            batch.entries = []
            self._logits(batch.ids, kept=batch.entries)

    def kl_of_plan(self, plan: BitPlan) -> float:
        """Of a plan for all layers; it may split units."""
        return float(self.kl_of_plan_by_sequence(plan).double().mean())

    def kl_of_plan_by_sequence(self, plan: BitPlan) -> Float[Tensor, " samples"]:
        self._set({name: plan.bits(name) for name in self.layers})
        return torch.cat([self._kl_of(batch, 0) for batch in self._batches])

    def _set(self, wanted: Mapping[str, int]) -> None:
        for name, bits in wanted.items():
            if self.widths[name] != bits:
                self.layers[name].weight.data = self.read(name, bits)
                self.widths[name] = bits

    def read(self, name: str, bits: int) -> Tensor:
        """A layer's weight as its module holds it. Made once, while there is room to keep it."""
        known = self._reads.get((name, bits))
        if known is not None:
            return known
        layer = self.layers[name]
        made = models.held_as(layer, self.checkpoint.read(name, bits).read(bits).dense())
        if made.nbytes <= self._spare:
            self._spare -= made.nbytes
            self._reads[name, bits] = made
        return made
