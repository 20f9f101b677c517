"""Which widths to read, and to hold, of what a caller asked for and a folder has."""

from matquant.checkpoint.reading import Checkpoint
from matquant.errors import PlanError, choices
from matquant.plan import BitPlan


def choose(checkpoint: Checkpoint, bits: int | BitPlan | None, keep: int | None) -> tuple[BitPlan, int]:
    """(plan to read at, widest width to load). Raises PlanError or MissingPlanesError."""
    offered = checkpoint.layout.widths
    checkpoint.check_widths(min(offered))
    if keep is not None and keep not in offered:
        raise PlanError(f"keep is {keep}; {choices(keep, offered)}")
    if bits is None:
        keep = max(checkpoint.widths) if keep is None else keep
        bits = min(checkpoint.bits, keep)
    plan = BitPlan(bits) if isinstance(bits, int) else bits
    plan.check(checkpoint.modules, offered)
    used = max(plan.bits(name) for name in checkpoint.modules)
    keep = used if keep is None else keep
    if used > keep:
        raise PlanError(f"keep is {keep}, but {used} bits are to be read; give keep={used} or more")
    checkpoint.check_widths(keep)
    return plan, keep
