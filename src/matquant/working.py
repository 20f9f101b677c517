"""OUT.partial, where a run keeps what it has done: whose it is, when it may be made or continued, and how it goes away."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.checkpoint.files import MANIFEST, replace_whole
from matquant.errors import InputError, MatquantError, ResumeError
from matquant.recipe import Recipe
from matquant.report import Report

FINISHED = "finished"  # a file there: all that is left to do is to rename and to clean up


def check_output(out: Path, work: Path, resume: bool, overwrite: bool) -> None:
    """Raise InputError or ResumeError if a run must not write there."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists already; choose another output folder, or replace it with --overwrite")
    if os.path.lexists(out) and not (out / MANIFEST).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(
            f"{out} is no finished checkpoint, and --overwrite deletes nothing else; choose another output folder, or delete it yourself"
        )
    if work.exists() and not (resume or overwrite):
        raise InputError(f"{work} holds an interrupted run; continue it with --resume, or start over with --overwrite")
    if resume and not work.exists():
        raise ResumeError(f"nothing to resume: there is no {work}; start without --resume")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to put {out.name} into; create it first")


def claim(work: Path, identity: Mapping[str, Any], recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Make the working folder, or take over the one of an equal run. Raises ResumeError with the differences."""
    if overwrite and not resume:
        shutil.rmtree(work, ignore_errors=True)
    record = {"identity": identity, "recipe": recipe.to_dict()}
    if resume and (work / "run.json").exists():
        if changed := _differences(work / "run.json", identity, recipe):
            raise ResumeError(f"{work} is a run with other settings ({'; '.join(changed)}); use the same, or start over with --overwrite")
        return
    shutil.rmtree(work, ignore_errors=True)  # killed before it knew what it was
    (work / "blocks").mkdir(parents=True)
    replace_whole(work / "run.json", json.dumps(record, indent=1).encode())


def _differences(path: Path, identity: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Lines `name: then -> now`. Raises ResumeError if the record is damaged or of another version."""
    try:
        before = json.loads(path.read_bytes())
        then: dict[str, Any] = dict(before["identity"])
        changed = Recipe.from_dict(before["recipe"]).differences(recipe)
    except (ValueError, KeyError, TypeError, MatquantError):
        raise ResumeError(f"{path} is damaged or of another version of matquant; start over with --overwrite") from None
    names = dict.fromkeys([*then, *identity])
    return changed + [f"{name}: {then.get(name)} -> {identity.get(name)}" for name in names if then.get(name) != identity.get(name)]


def only_to_clean(out: Path, work: Path, overwrite: bool) -> bool:
    """Whether a run was killed after its last rename."""
    if (work / FINISHED).exists():
        return not (work / "checkpoint").exists()
    # The very last step removes an empty folder. The very first makes one, but then no output is there, unless to be overwritten.
    return not overwrite and (out / MANIFEST).exists() and work.is_dir() and not any(work.iterdir())


def clean_up(work: Path) -> None:
    """Delete the working folder, the mark that the run is finished last."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != FINISHED:
            path.unlink()
    shutil.rmtree(work)


def saved_report(folder: Path) -> Report:
    """The report of a finished checkpoint. Raises InputError."""
    try:
        return Report.from_dict(json.loads((folder / "report.json").read_bytes()), str(folder / "report.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / 'report.json'} ({error}); run matquant verify {folder}") from None
