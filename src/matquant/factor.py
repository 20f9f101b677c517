"""Factor: a damped Hessian and the Cholesky factor of its inverse, in the order in which GPTQ visits input channels.

U = chol(H^-1), upper, needs no inverse of H: with H in reverse order = L L^T, L^-1 read backwards in rows and columns is U.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

DAMPING_RAISES = (1, 10, 100)  # times the recipe's damping, tried in turn when H^-1 has no Cholesky factor


@dataclass(frozen=True)
class Factor:
    """order: columns in the order they are visited. upper: U = chol(H^-1) in that order. damped: H, in its own order.

    notes: what had to be mended. sound: False where H could not be factored, and U and `damped` are the identity instead.
    """

    order: Int[Tensor, " in"]
    upper: Float[Tensor, "in in"]
    damped: Float[Tensor, "in in"]
    notes: tuple[str, ...]
    sound: bool = True

    def cost_in_place(self) -> Float[Tensor, " in"]:
        """1 / U_jj^2 of every column in the weight's own order: what a unit error there costs after feedback."""
        cost = torch.empty_like(self.upper[0])
        cost[self.order] = torch.diagonal(self.upper).square().reciprocal()
        return cost

    def solve(self, right: Float[Tensor, "in n"]) -> Float[Tensor, "in n"]:
        """damped^-1 right = U^T U right, in the weight's own order."""
        upper = self.upper.double()
        solved = torch.empty_like(right)
        solved[self.order] = (upper.T @ (upper @ right[self.order].double())).to(right.dtype)
        return solved


def visiting_order(hessians: Iterable[Float[Tensor, "in in"]], act_order: bool) -> Int[Tensor, " in"]:
    """Input channels by descending power, each Hessian counted relative to its mean; or as they stand."""
    power = sum(torch.diagonal(h) / torch.diagonal(h).mean().clamp(min=1e-30) for h in hessians)
    assert isinstance(power, Tensor), "no Hessian"
    if act_order and power.isfinite().all():
        return torch.argsort(power, descending=True, stable=True)
    return torch.arange(len(power), device=power.device)


def factorize_all(hessians: Mapping[int, Float[Tensor, "in in"]], damping: float, act_order: bool) -> dict[int, Factor]:
    """The factor of every stream's H, all in one order."""
    order = visiting_order(hessians.values(), act_order)
    return {stream: factorize(h, damping, order) for stream, h in hessians.items()}


def factorize(h: Float[Tensor, "in in"], damping: float, order: Int[Tensor, " in"]) -> Factor:
    """Damp, order and factor H. Where no damping helps, U = identity: no feedback, that is, rounding to nearest."""
    notes: list[str] = []
    columns = len(h)
    identity = torch.eye(columns, device=h.device)
    diagonal = torch.diagonal(h).clone()
    if not h.isfinite().all():
        return Factor(order, identity, identity, ("the Hessian is not finite: rounded to nearest",), sound=False)
    dead = diagonal <= 0
    if dead.any():
        notes.append(f"{int(dead.sum())} of {columns} inputs are always 0: their weights are rounded to nearest")
    matrix, backwards = h.double(), order.flip(0)
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), device=h.device)
    matrix[dead, dead] = mean.double()  # such an input has no covariance with any other: it gets and gives no feedback
    for raise_by in DAMPING_RAISES:
        damped = matrix + torch.eye(columns, dtype=torch.float64, device=h.device) * (damping * raise_by * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
        upper = torch.linalg.solve_triangular(lower, identity.double(), upper=False).flip(0, 1)
        if not failed and upper.isfinite().all():
            if raise_by > 1:
                notes.append(f"damping raised to {damping * raise_by:g}: the Hessian had no Cholesky factor below")
            return Factor(order, upper.float(), damped.float(), tuple(notes))
    notes.append(f"no Cholesky factor up to damping {damping * DAMPING_RAISES[-1]:g}: rounded to nearest")
    return Factor(order, identity, identity, tuple(notes), sound=False)
