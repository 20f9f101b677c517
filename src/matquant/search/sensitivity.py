"""What every unit adds to the KL of the whole model when it alone is read narrower, measured once and kept as JSON.

    L(i, r)       KL with unit i at r bits and all else at the widest; L(0) with all at the widest (0 where that is the reference itself)
    I(i, j)       L(i, j) - L(i) - L(j) + L(0) at one width, for units of one block and of neighbouring blocks (CLADO, https://arxiv.org/abs/2307.05657)

To second order KL is a square, |d_1 + d_2 + ...|^2 / 2 in the metric of the predictions: I is twice the inner product of two units' effects, and other
widths scale it by their lengths, so I(i at r, j at s) = I(i, j) sqrt(L(i, r) L(j, s) / (L(i) L(j))). A negative I comes of reads that were
fitted to each other at one width, and make up for each other at no other: where r and s differ, only a positive I counts.

Sums of L miss what grows with the square of everything together. Uniform widths are measured too, and a prediction is read off the line through them:
from the sum of L at every uniform width to its true KL, straight in logarithms. That changes no order among plans.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.search.probe import Probe
from matquant.search.units import Unit

FILE, VERSION = "sensitivity.json", 1
MAX_BYTES = 64 * 2**20

Save = Callable[["Sensitivity"], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """What numbers depend on: the checkpoint's weights, the text, and what was compared with. text: in words. ids: its sequences, one length all."""

    checkpoint: str
    text: str
    reference: str
    ids: tuple[tuple[int, ...], ...]

    @property
    def sequences(self) -> Int[Tensor, "samples length"]:
        return torch.tensor(self.ids)


@dataclass(frozen=True)
class Sensitivity:
    """kl: of every unit, width -> L. uniform: width -> KL. Both in nats a token, and incomplete while it is being measured.

    pair_bits: the width of `pairs`; None if there are none. single: L at that width on the pairs' text. pairs: (i, j) -> I, for i < j.
    """

    setting: Setting
    units: tuple[Unit, ...]
    base: float
    kl: tuple[Mapping[int, float], ...]
    uniform: Mapping[int, float]
    pair_bits: int | None = None
    pairs: Mapping[tuple[int, int], float] | None = None

    def losses(self, widths: Sequence[int]) -> Float[np.ndarray, "units widths"]:
        """L(i, r) - L(0), not below 0; 0 at the widest. Raises InputError where something was not measured."""
        widest = max(widths)
        missing = [(unit, r) for unit, own in zip(self.units, self.kl, strict=True) for r in widths if r not in own and r != widest]
        if missing:
            raise InputError(
                f"{len(missing)} sensitivities are missing, {missing[0][0].layers[0]} at {missing[0][1]} bits the first; run matquant plan"
            )
        rows = [[0.0 if r == widest else max(own[r] - self.base, 0.0) for r in widths] for own in self.kl]
        return np.array(rows)

    def pair_terms(self, widths: Sequence[int]) -> dict[tuple[int, int], Float[np.ndarray, "widths widths"]]:
        """I of every pair at all widths. Raises InputError where no pairs were measured."""
        if not self.pairs or self.pair_bits is None:
            raise InputError("no pairs of units were measured; run matquant plan --solver quadratic")
        losses, at = self.losses(widths), list(widths).index(self.pair_bits)
        size, alike = np.sqrt(losses / np.maximum(losses[:, at : at + 1], 1e-12)), np.eye(len(widths), dtype=bool)
        return {(i, j): np.where(alike | (term > 0), term * np.outer(size[i], size[j]), 0.0) for (i, j), term in self.pairs.items()}

    def predict(self, total: float) -> float:
        """The KL of a plan whose losses sum to `total`."""
        known = {r for own in self.kl for r in own}
        points = sorted((sum(own.get(r, math.nan) - self.base for own in self.kl), kl) for r, kl in self.uniform.items() if r in known)
        points = [(x, y - self.base) for x, y in points if x > 0 and y - self.base > 0]
        if total <= 0 or not points:
            return self.base + max(total, 0.0)
        if total <= points[0][0] or len(points) == 1:
            return self.base + total * points[0][1] / points[0][0]
        xs, ys = np.log([x for x, _ in points]), np.log([y for _, y in points])
        return self.base + float(np.exp(np.interp(math.log(total), xs, ys)))

    @property
    def wanted_pairs(self) -> list[tuple[int, int]]:
        """Of one block and of neighbouring blocks."""
        blocks = [unit.block for unit in self.units]
        return [(i, j) for i, j in combinations(range(len(blocks)), 2) if abs(blocks[i] - blocks[j]) <= 1 and -1 not in (blocks[i], blocks[j])]

    @property
    def pairs_complete(self) -> bool:
        return set(self.wanted_pairs) <= set(self.pairs or ())

    # --- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        keyed = lambda table: {str(r): table[r] for r in sorted(table, reverse=True)}  # noqa: E731
        units = [{"layers": list(unit.layers), "block": unit.block, "kl": keyed(own)} for unit, own in zip(self.units, self.kl, strict=True)]
        pairs = None if self.pairs is None else [[i, j, term] for (i, j), term in sorted(self.pairs.items())]
        data = {
            "version": VERSION, **asdict(self.setting), "base": self.base, "uniform": keyed(self.uniform), "units": units,
            "pair_bits": self.pair_bits, "pairs": pairs,
        }  # fmt: skip
        text = json.dumps(data, indent=1, allow_nan=False)
        return re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text) + "\n"  # a row of numbers a line

    @staticmethod
    def from_json(text: str, source: str = FILE) -> "Sensitivity":
        """Raises InputError for anything that `to_json` did not make."""
        try:
            data: Any = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, not {VERSION}")
            ids = tuple(tuple(_of(int, token) for token in row) for row in data["ids"])
            if not ids or len({len(row) for row in ids}) != 1:
                raise ValueError("sequences of different lengths")
            setting = Setting(_of(str, data["checkpoint"]), _of(str, data["text"]), _of(str, data["reference"]), ids)
            units = tuple(Unit(tuple(_of(str, name) for name in row["layers"]), _of(int, row["block"])) for row in data["units"])
            pairs = None if data["pairs"] is None else {(_of(int, i), _of(int, j)): _number(term) for i, j, term in data["pairs"]}
            if any(not 0 <= i < j < len(units) for i, j in pairs or ()):
                raise ValueError("a pair of units that are not there")
            bits = None if data["pair_bits"] is None else _of(int, data["pair_bits"])
            kl = tuple(_table(row["kl"]) for row in data["units"])
            return Sensitivity(setting, units, _number(data["base"]), kl, _table(data["uniform"]), bits, pairs)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{source} holds no sensitivities that this matquant understands ({error!r}); delete it and measure again") from None


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def _table(data: Mapping[str, Any]) -> dict[int, float]:
    return {int(bits): _number(value) for bits, value in data.items()}


def identity(checkpoint: Checkpoint) -> str:
    """sha256 over names and sha256 of all weight files, and of the index where no MANIFEST tells these."""
    files = sorted(set(checkpoint.index.values()))
    if checkpoint.manifest is not None:
        facts = [[name, checkpoint.manifest.files[name].sha256] for name in files if name in checkpoint.manifest.files]
    else:
        facts = [[name, (checkpoint.folder / name).stat().st_size] for name in files if name not in checkpoint.missing]
    return hashlib.sha256(json.dumps([facts, sorted(checkpoint.index.items())]).encode()).hexdigest()


def load(path: Path, checkpoint: Checkpoint) -> Sensitivity | None:
    """None if there is no such file. Raises InputError for one that is damaged, or of another checkpoint."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is longer than {MAX_BYTES} bytes, the most that sensitivities may have")
        found = Sensitivity.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; delete it and measure again") from None
    if found.setting.checkpoint != identity(checkpoint):
        raise InputError(f"{path} was measured on other weights than those of {checkpoint.folder}; delete it and measure again")
    if any(name not in checkpoint.modules for unit in found.units for name in unit.layers):
        raise InputError(f"{path} names layers that {checkpoint.folder} does not have; delete it and measure again")
    return found


# --- measuring ------------------------------------------------------------------------------------------------------


def start(setting: Setting, units: Sequence[Unit]) -> Sensitivity:
    """Nothing measured yet."""
    return Sensitivity(setting, tuple(units), 0.0, tuple({} for _ in units), {})


def measure(probe: Probe, known: Sensitivity, widths: Sequence[int], save: Save, progress: Progress = lambda *_: None) -> Sensitivity:
    """All of L and the uniform widths; what `known` holds is not measured again. save: called after every unit that was."""
    narrow = [r for r in widths if r != probe.widest]
    total, done = len(known.units) * len(narrow), sum(len(set(narrow) & set(own)) for own in known.kl)
    if not known.uniform:
        base = _mean(probe.kl({}))
        uniform = {r: _mean(probe.kl(dict.fromkeys(range(len(known.units)), r))) for r in narrow}
        known = replace(known, base=base, uniform={probe.widest: base} | uniform)
        save(known)
    progress("sensitivity", done, total)
    for i in range(len(known.units)):
        own = dict(known.kl[i])
        for r in [r for r in narrow if r not in own]:
            own[r] = _mean(probe.kl({i: r}))
            done += 1
            progress("sensitivity", done, total)
        if own != known.kl[i]:
            known = replace(known, kl=(*known.kl[:i], own, *known.kl[i + 1 :]))
            save(known)
    return known


def measure_pairs(
    probe: Probe, known: Sensitivity, bits: int, samples: int | None, save: Save, progress: Progress = lambda *_: None
) -> Sensitivity:  # fmt: skip
    """I of all units within a block and of neighbouring blocks, at `bits`, on the first `samples` sequences."""
    blocks, wanted = [unit.block for unit in known.units], known.wanted_pairs
    pairs = dict(known.pairs or {}) if known.pair_bits == bits else {}
    base = _mean(probe.kl({}, samples))
    singles: dict[int, float] = {}

    def single(i: int) -> float:
        if i not in singles:
            singles[i] = _mean(probe.kl({i: bits}, samples))
        return singles[i]

    missing = [pair for pair in wanted if pair not in pairs]
    for done, (i, j) in enumerate(missing):
        progress("pairs", len(wanted) - len(missing) + done, len(wanted))
        pairs[i, j] = _mean(probe.kl({i: bits, j: bits}, samples)) - single(i) - single(j) + base
        if j == len(blocks) - 1 or done == len(missing) - 1 or blocks[missing[done + 1][0]] != blocks[i]:
            save(replace(known, pair_bits=bits, pairs=pairs))
    progress("pairs", len(wanted), len(wanted))
    return replace(known, pair_bits=bits, pairs=pairs)


def _mean(values: Any) -> float:
    return float(values.double().mean())
