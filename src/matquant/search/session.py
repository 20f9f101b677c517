"""One checkpoint being planned: what was measured of it, and a probe that is opened when something has to be measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from matquant.checkpoint import Checkpoint, add_files
from matquant.checkpoint.files import replace_whole
from matquant.errors import InputError, PlanError, choices
from matquant.plan import BitPlan
from matquant.search import proxies, sensitivity
from matquant.search.plans import model_of
from matquant.search.probe import Probe
from matquant.search.sensitivity import Sensitivity, Setting
from matquant.search.units import Structure, by_module, examine, separate

PAIR_BITS, PAIR_SAMPLES = 3, 2  # width and sequences that pairs of units are measured at
GRAINS = ("module", "fused", "layer")  # attention or MLP of a block; what engines fuse; every layer
OWN = "its own widest read"  # what is compared with where no reference is given


@dataclass(frozen=True)
class Source:
    """What is measured with, fetched when it is needed. text: (sequences, in words). reference: the original model, and what it is called."""

    text: Callable[[], tuple[Tensor, str]]
    reference: Callable[[], Any] | None = None
    name: str = OWN


@dataclass
class Session:
    """file: where sensitivities are kept; None = in the checkpoint. grain: what gets one width, by GRAINS. again: forget what was measured."""

    checkpoint: Checkpoint
    source: Source
    file: Path | None = None
    grain: str = "module"
    again: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    progress: Callable[[str, int, int], None] = lambda *_: None
    structure: Structure = field(init=False)
    known: Sensitivity | None = field(init=False)
    _probe: Probe | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise PlanError(f"units is {self.grain!r}; {choices(self.grain, GRAINS)}")
        self.structure = examine(self.checkpoint)
        if self.grain != "fused":
            units = separate(self.checkpoint) if self.grain == "layer" else by_module(self.structure.units)
            self.structure = replace(self.structure, units=units)
        self.model = model_of(self.checkpoint, self.structure)
        self.known = None if self.again else sensitivity.load(self.path, self.checkpoint)
        if self.known is not None and self.known.units != self.structure.units:
            raise InputError(f"{self.path} was measured on other units of layers; measure again (--again), or keep them apart (--sensitivity FILE)")

    @property
    def path(self) -> Path:
        return self.file or self.checkpoint.folder / sensitivity.FILE

    @property
    def widths(self) -> tuple[int, ...]:
        return self.model.layout.widths

    def probe(self) -> Probe:
        """On the text of the sensitivities. Raises InputError where they were compared with another reference."""
        if self._probe is None:
            if self.known is None:
                ids, words = self.source.text()
                setting = Setting(sensitivity.identity(self.checkpoint), words, self.source.name, tuple(tuple(row) for row in ids.tolist()))
                self.known = sensitivity.start(setting, self.structure.units)
            if self.known.setting.reference != self.source.name:
                raise InputError(f"sensitivities were measured against {self.known.setting.reference}; give the same --reference, or --again")
            reference = None if self.source.reference is None else self.source.reference()
            self._probe = Probe(
                self.checkpoint, self.structure.units, self.known.setting.sequences, reference, device=self.device, dtype=self.dtype
            )  # fmt: skip
        return self._probe

    def measured(self, pairs: bool = False) -> Sensitivity:
        """All sensitivities, and pairs if they are wanted; what is not known is measured, and kept as it comes."""
        narrow = set(self.widths) - {max(self.widths)}
        if self.known is None or any(narrow - set(own) for own in self.known.kl):
            probe = self.probe()
            assert self.known is not None
            self.known = sensitivity.measure(probe, self.known, self.widths, self._save, self.progress)
        if pairs and not self.known.pairs_complete:
            bits = min((r for r in self.widths if r != max(self.widths)), key=lambda r: abs(r - PAIR_BITS))
            self.known = sensitivity.measure_pairs(self.probe(), self.known, bits, PAIR_SAMPLES, self._save, self.progress)
        return self.known

    def losses(self, loss: str) -> Float[np.ndarray, "units widths"]:
        """By the names of planning.LOSSES."""
        units, widths = self.structure.units, self.widths
        if loss == "kl":
            return self.measured().losses(widths)
        if loss == "fisher":
            return proxies.fisher(self.probe(), widths)
        return {"round-off": proxies.round_off, "output-error": proxies.output_error}[loss](self.checkpoint, units, widths)

    def predicted(self, plan: BitPlan) -> float | None:
        """None for a plan that splits units, or before anything was measured."""
        if self.known is None or not all(self.known.kl):
            return None
        losses, total = self.known.losses(self.widths), 0.0
        for unit, row in zip(self.structure.units, losses, strict=True):
            used = {plan.bits(name) for name in unit.layers}
            if len(used) > 1:
                return None
            total += float(row[self.widths.index(used.pop())])
        return self.known.predict(total)

    def _save(self, found: Sensitivity) -> None:
        self.known = found
        content = found.to_json().encode()
        if self.file is None:
            add_files(self.checkpoint.folder, {sensitivity.FILE: content})
        else:
            replace_whole(self.file, content)


def written(folder: Path, name: str, plan: BitPlan) -> Mapping[str, bytes]:
    """A plan put into a checkpoint and its MANIFEST. Returns the file."""
    files = {f"plans/{name}.json": plan.to_json().encode()}
    add_files(folder, files)
    return files
