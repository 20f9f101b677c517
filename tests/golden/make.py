"""Writes codes.json: every code x read width x parent width 2..8 x rule, from the written formulas alone.

Plain integers and fractions, nothing from matquant, so that `codes.py` and every other backend can be held against it.
One entry per (parent, bits, slicing, overlap), and for the codes q = 0, 1, ..., 2^parent - 1 in order:

    codes      the sliced code p
    twice      two times the value read, in parent steps and before the zero is taken off (w = s (value - z)): always whole

Run `python tests/golden/make.py` after a change of the formulas; a test fails while the file and this script differ.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("codes.json")
HALF = Fraction(1, 2)


def floor_read(q: int, d: int) -> tuple[int, Fraction]:
    p = q // 2**d
    return p, p * 2**d + Fraction(2**d - 1, 2)


def overlap_read(q: int, r: int) -> tuple[int, Fraction]:
    """Of an 8-bit code: high nibble b, low nibble e, and a residual step worth 16 / B = 2 parent steps."""
    if r <= 4:
        return floor_read(q, 8 - r)
    b, e, B = q // 16, q % 16, 8
    cut = 2 ** (8 - r)
    kept = e // cut
    center = kept * cut + Fraction(cut - 1, 2)
    return B // cut * b + kept, 16 * b + 15 * HALF + Fraction(16, B) * (center - 15 * HALF)


def round_read(q: int, c: int, r: int, overflow: bool) -> tuple[int, Fraction]:
    """The multiple of 2^d that is nearest to q, halves up; without overflow, at most 2^r - 1 of them."""
    step = 2 ** (c - r)
    p = (2 * q + step) // (2 * step)
    if not overflow:
        p = min(p, 2**r - 1)
    return p, Fraction(p * step)


def read(q: int, c: int, r: int, slicing: str, overlap: bool) -> tuple[int, Fraction]:
    if overlap:
        return overlap_read(q, r)
    return floor_read(q, c - r) if slicing == "floor" else round_read(q, c, r, slicing == "round-overflow")


def entry(c: int, r: int, slicing: str, overlap: bool) -> dict[str, Any]:
    reads = [read(q, c, r, slicing, overlap) for q in range(2**c)]
    twice = [2 * value for _, value in reads]
    assert all(value.denominator == 1 for value in twice)
    return {"parent": c, "bits": r, "slicing": slicing, "overlap": overlap, "codes": [p for p, _ in reads], "twice": [int(v) for v in twice]}


def table() -> list[dict[str, Any]]:
    rules = [(c, slicing, False) for c in range(2, 9) for slicing in ("floor", "round", "round-overflow")] + [(8, "floor", True)]
    return [entry(c, r, slicing, overlap) for c, slicing, overlap in rules for r in range(2, c + 1)]


def text() -> str:
    """The file: one entry a line."""
    return "[\n" + ",\n".join(json.dumps(line, separators=(",", ":")) for line in table()) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="ascii")
