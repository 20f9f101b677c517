"""200 random single-byte changes and 200 random truncations: verify refuses each, and none loads wrong weights."""

import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from small_checkpoint import reads_right, save

from matquant.checkpoint import Checkpoint, describe, verify
from matquant.errors import MatquantError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sound") / "out"
    return folder, save(folder)


def flip(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :]


def truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


@pytest.mark.parametrize("damage", [flip, truncate])
def test_every_damaged_byte_is_refused_and_no_wrong_weight_is_read(sound, tmp_path: Path, damage) -> None:
    """Files in turn (MANIFEST.json included), so that each is hit about 15 times whatever its size."""
    folder, weights = sound
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 13
    chance = random.Random(0)
    shutil.copytree(folder, tmp_path / "out")
    refused = 0
    for number in range(200):
        name = files[number % len(files)]
        sane = (folder / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(damage(sane, chance))
        assert verify(tmp_path / "out"), f"number {number}, {name}: verify finds nothing"
        for checksums in (True, False):  # without checksums wrong weights are possible, but nothing worse
            try:
                checkpoint = Checkpoint.open(tmp_path / "out", checksums=checksums)
                right = reads_right(checkpoint, weights)
                assert right or not checksums, f"number {number}, {name}: wrong weights"
            except MatquantError:
                refused += checksums
        with suppress(MatquantError):
            describe(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(sane)
    assert refused >= 150  # all but the README, tokenizer and plan, which no reader of weights looks at
    assert verify(tmp_path / "out") == []
