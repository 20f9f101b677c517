"""`matquant.from_pretrained`: a checkpoint as a transformers model, at a width, a plan, the name of a plan, a plan file or a mean width."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant import hf
from matquant.plan import BitPlan
from matquant.search.plans import Wanted, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB = ("revision", "token", "cache_dir", "local_files_only")


def from_pretrained(path_or_id: str | Path, bits: Wanted = None, *, keep: int | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Load a causal LM from a matquant folder or Hub id, reading at `bits`.

    bits: a width (4); a BitPlan; "NAME" of a plan in the checkpoint; a plan file; 3.5 or "3.5", the best plan of that many bits a weight, metadata
    counted; None = the default of the checkpoint and everything it has.
    keep: the widest width that `set_bits` may switch to later; planes beyond it are neither downloaded nor read. None = every layer holds the planes
    of its own width and no others. dtype, device_map and other keywords go to AutoModelForCausalLM.from_pretrained.
    Raises InputError, PlanError, MissingPlanesError, CheckpointError.
    """
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    folder, found = locate(path_or_id, bits, keep, **hub)
    return hf.from_pretrained(folder, found, keep=keep, **kwargs)


def locate(path_or_id: str | Path, bits: Wanted, keep: int | None, **hub: Any) -> tuple[Path, int | BitPlan | None]:
    """(the local folder, what to read it at), after downloading from the Hub the files that this needs. Raises as `from_pretrained`."""
    local = Path(path_or_id).is_dir()
    if bits is None or isinstance(bits, BitPlan) or type(bits) is int:
        return hf.locate(path_or_id, bits, keep, **hub), bits
    folder = hf.locate(path_or_id, 2, None, **hub)  # the narrowest planes come with every plan and table
    plan = resolve(folder, bits, fetched=local)
    return (folder if local else hf.locate(path_or_id, plan, keep, **hub)), plan
