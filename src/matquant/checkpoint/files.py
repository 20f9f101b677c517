"""Files of a checkpoint folder as untrusted input: bounded reads, safe names, sha256 and MANIFEST.json.

Nothing here knows what a tensor is. Everything raises CheckpointError with the file's name; no other exception leaves.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.errors import CheckpointError

CONFIG, INDEX, SINGLE, MANIFEST = "config.json", "model.safetensors.index.json", "model.safetensors", "MANIFEST.json"
MIB = 2**20
# Far above any real file, far below what hurts: config.json of a model with 30000 quantized modules is 2 MiB, an index
# of 200000 tensors 20 MiB. A plan names each module once.
MAX_BYTES = {CONFIG: 4 * MIB, INDEX: 64 * MIB, MANIFEST: 16 * MIB}
MAX_PLAN_BYTES = 4 * MIB
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]*")


def safe_name(name: object, depth: int = 8) -> bool:
    """Whether `name` is a plain relative POSIX path of at most `depth` parts, none of which starts with a dot."""
    if not isinstance(name, str) or len(name) > 255:
        return False
    parts = name.split("/")
    return len(parts) <= depth and all(_PART.fullmatch(part) for part in parts)


def locate(folder: Path, name: str) -> Path:
    """The path of `name`, once it is known to be a regular file that does not leave the folder, or nothing at all.

    A symlink may point elsewhere in the folder, or, in the Hub's cache layout (REPO/snapshots/REVISION), into REPO/blobs.
    """
    if not safe_name(name):
        raise CheckpointError(f"{folder} names the file {name!r}; allowed: relative names of letters, digits and _ . + - inside the folder")
    path = folder / name
    try:
        kind = os.lstat(path).st_mode
        if stat.S_ISREG(kind) and "/" not in name:
            return path  # neither it nor a folder on the way is a link
        root, real = folder.resolve(), path.resolve()
        kind = os.stat(real).st_mode
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError) as error:  # a loop of symlinks; RuntimeError before Python 3.13
        raise CheckpointError(f"{path} cannot be followed: {error}") from None
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link out of the checkpoint, to {real}; copy the file into the folder instead")
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path} is not a regular file")
    return path


def present(folder: Path, name: str) -> bool:
    return locate(folder, name).exists()


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """The whole file. Raises CheckpointError if it is absent, unreadable or longer than `limit`."""
    path = locate(folder, name)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > limit:
        raise CheckpointError(f"{path} is longer than {limit} bytes, the most that such a file may have")
    return content


def parse_json(content: bytes, source: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, for duplicate keys, NaN, infinities and deep nesting."""
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{source} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, over-long integers and the two hooks below
        raise CheckpointError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not {type(data).__name__}")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} stands twice")
    return seen


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def replace_whole(path: Path, content: bytes) -> None:
    """Write a whole file or none. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sha256_file(path: Path) -> tuple[str, int]:
    """(hex digest, size). Reads 1 MiB at a time."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(MIB))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest(), size


def walk(folder: Path) -> list[str]:
    """Names of everything in the folder that is not a folder, sorted; names that start with a dot are not looked at."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not os.path.islink(os.path.join(parent, name))]
        links = [name for name in os.listdir(parent) if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in {*names, *links} if not name.startswith(".")]
    return sorted(found)


@dataclass(frozen=True)
class Entry:
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """sha256 and size of every file of a checkpoint but MANIFEST.json itself.

    On disk: {"digest": sha256 of the compact JSON of "files", "files": {name: {"sha256", "size"}}, "version": 1}, keys
    sorted, indent 1, a final newline, ASCII. Only this spelling is accepted, so that every changed byte is noticed.
    """

    files: Mapping[str, Entry]

    @staticmethod
    def of(folder: Path, names: Iterable[str]) -> "Manifest":
        return Manifest({name: Entry(*sha256_file(folder / name)) for name in sorted(names)})

    def to_bytes(self) -> bytes:
        files = {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in self.files.items()}
        digest = hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return (json.dumps({"digest": digest, "files": files, "version": 1}, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def load(folder: Path) -> "Manifest | None":
        """None if the folder has no MANIFEST.json. Raises CheckpointError if it has a damaged one."""
        if not present(folder, MANIFEST):
            return None
        path = folder / MANIFEST
        content = read_bytes(folder, MANIFEST, MAX_BYTES[MANIFEST])
        data = parse_json(content, str(path))
        if data.get("version") != 1 or not isinstance(data.get("files"), dict):
            raise CheckpointError(f'{path} must have "version": 1 and "files"')
        files: dict[str, Entry] = {}
        for name, entry in data["files"].items():
            sound = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
            if not sound or not safe_name(name) or name == MANIFEST:
                raise CheckpointError(f"{path} has a bad entry for {name!r}; each names a file inside the folder and gives its sha256 and size")
            files[name] = Entry(entry["sha256"], entry["size"])
        if Manifest(files).to_bytes() != content:
            raise CheckpointError(f"{path} is damaged: its digest or spelling is wrong; fetch the folder again")
        return Manifest(files)

    def problem(self, folder: Path, name: str) -> str | None:
        """What is wrong with one file, by size first and then by sha256; None if nothing is."""
        entry, path = self.files.get(name), locate(folder, name)
        if entry is None:
            return f"{path} is not listed in {MANIFEST}"
        if not path.exists():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry.size:
            return f"{path} has {size} bytes, but {MANIFEST} says {entry.size}: it is damaged or half-fetched; fetch it again"
        digest, _ = sha256_file(path)
        return None if digest == entry.sha256 else f"{path} differs from its sha256 in {MANIFEST}: it is damaged or was edited; fetch it again"

    def check_bytes(self, folder: Path, name: str, content: bytes) -> None:
        """Raise CheckpointError unless `content`, just read from `name`, is what was written."""
        entry = self.files.get(name)
        if entry is None or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointError(
                f"{folder / name} differs from its sha256 in {MANIFEST}: it is damaged or was edited; "
                f"fetch it again, or delete {MANIFEST} if the edit was meant"
            )
