"""What the codes of one group of layers minimise: the output error of every target width at once, through one shared code.

    L(q) = sum_r weight_r  (W_r - read_r(q)) H_r (W_r - read_r(q))^T          row by row

H_r holds the second moments of the layer's inputs as width r will see them. W_r is the original weight, or, with
`asymmetric_calibration`, the weight that best turns r's drifted inputs X_r into the outputs that the original gives on its own
inputs X (GPTAQ, https://arxiv.org/abs/2504.02692; in closed form as in QEP, https://arxiv.org/abs/2504.09629):

    W_r = W + alpha W C_r (H_r + damping)^-1            C_r = mean over tokens of (x - x_r) x_r^T

Losses of 8 and 2 bits differ by a factor of 4096, so targets are shares by default: weight_r = lam_r / N_r, with N_r what a
GPTQ run dedicated to r is expected to lose on that row. GPTQ loses e_j^2 / U_jj^2 in column j (https://arxiv.org/abs/2210.17323),
e_j the rounding error of that column; feedback moves weights, yet hardly the size of their rounding errors, so rounding the
original row to its best r-bit grid tells them:

    N_r = sum_j (w_j - nearest_r(w_j))^2 / U_r,jj^2

Without `normalize`, weight_r = lam_r as in the papers, in units of the squared parent step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from matquant.activations import Inputs
from matquant.clip import search_grid
from matquant.codes import CodeChooser, Grid, nearest_code
from matquant.factor import Factor
from matquant.recipe import Recipe
from matquant.refit import refit
from matquant.weight import NestedWeight


@dataclass(frozen=True)
class Objective:
    """Everything by stream, in the order of `chooser.streams`: the targets below the parent's width, then the parent.

    goal: W_r. h: H_r, damped as it was factored. weight: of each row's loss; 0 for a parent that is no target.
    """

    chooser: CodeChooser
    goal: tuple[Float[Tensor, "out in"], ...]
    h: tuple[Float[Tensor, "in in"], ...]
    weight: Float[Tensor, "streams out"]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.chooser.streams

    def losses(self, weight: NestedWeight) -> Float[Tensor, "streams out"]:
        """tr-terms of every row, not weighted."""
        return torch.stack([row_losses(goal, weight.read(r).dense(), h) for r, goal, h in zip(self.widths, self.goal, self.h, strict=True)])

    def value(self, losses: Float[Tensor, "streams out"]) -> Float[Tensor, " out"]:
        """L of every row."""
        return (self.weight.double() * losses).sum(0)

    def by_target(self, inputs: Inputs, recipe: Recipe) -> tuple[dict[int, Float[Tensor, " in"]], dict[int, Float[Tensor, " out"]]]:
        """(diag H_r, weight of every row) of the targets, as the clip search wants them."""
        weight = {r: rows for r, rows in zip(self.widths, self.weight, strict=True) if r in recipe.targets}
        power = {r: torch.diagonal(inputs.h[recipe.stream_of(r)]) for r in weight}
        return {r: torch.nan_to_num(h, nan=1.0, posinf=1.0).clamp(min=1e-12) for r, h in power.items()}, weight


def row_losses(w: Float[Tensor, "out in"], read: Float[Tensor, "out in"], h: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """Of each row e of w - read: e H e^T, in float64."""
    error = w - read
    return ((error @ h) * error).sum(1).double()


def build(w: Float[Tensor, "out in"], inputs: Inputs, factors: Mapping[int, Factor], recipe: Recipe, fixed: int = 0) -> Objective:
    """The objective of `recipe` for the float32 weight `w`. factors: of each stream's H, by the stream's width. fixed: CodeChooser's."""
    chooser = CodeChooser.of(recipe.targets, recipe.grid, recipe.slicing, fixed)
    goals: dict[int, Tensor] = {}
    for stream, factor in factors.items():
        cross = inputs.cross.get(stream)
        usable = cross is not None and factor.sound and bool(cross.isfinite().all())
        goals[stream] = w + recipe.asymmetric_calibration * factor.solve((w @ cross).T).T if usable else w
    stream_of = [recipe.stream_of(r) for r in chooser.streams]
    weight = [_row_weights(w, factors[s], r, recipe) for r, s in zip(chooser.streams, stream_of, strict=True)]
    return Objective(chooser, tuple(goals[s] for s in stream_of), tuple(factors[s].damped for s in stream_of), torch.stack(weight))


def _row_weights(w: Tensor, factor: Factor, bits: int, recipe: Recipe) -> Tensor:
    lam = recipe.importance.get(bits, 0.0)
    if not recipe.normalize or not lam:
        return w.new_full((len(w),), lam)
    return lam / expected_loss(w, factor, bits, recipe)


DEDICATED_SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4)  # an estimate: a finer search changes N_2 by less than 2 %


def expected_loss(w: Float[Tensor, "out in"], factor: Factor, bits: int, recipe: Recipe) -> Float[Tensor, " out"]:
    """N_r: what a GPTQ run of this width alone is expected to lose on each row."""
    cost = factor.cost_in_place()
    grid = Grid(bits, recipe.group_size, recipe.symmetric, overlap=False)
    alone = replace(
        recipe.aiming_at({bits: 1.0}), method="gptq", parent_bits=bits, bits=(bits,), streams=(), overlap=False, refit_bits=0, finetune_reads=0
    )
    shrinks = DEDICATED_SHRINKS if bits < 4 else (1.0,)  # from 4 bits up, clipping hardly pays
    scale, zero = search_grid(w, {bits: cost}, {bits: torch.ones(len(w), device=w.device)}, alone, shrinks)
    wg = w.reshape(*scale.shape, -1)
    z = grid.center if zero is None else zero[..., None]
    error = scale[..., None] * (nearest_code(wg / scale[..., None] + z, grid).float() - z) - wg  # uint8 would wrap below z
    loss = (error.reshape(w.shape).square() * cost).sum(1)
    return loss.clamp(min=1e-12 * loss.mean() + 1e-30)  # a row of zeros loses nothing, and has no say


def refit_interpolated(weight: NestedWeight, objective: Objective, factors: Mapping[int, Factor], recipe: Recipe) -> NestedWeight:
    """`weight` with the refits of widths that are no targets fitted to the goal of the nearest target. factors: by stream."""
    goals = dict(zip(objective.widths, objective.goal, strict=True))
    others = tuple(r for r in recipe.layout.refit_widths if r not in goals)
    nearest = {r: min(recipe.targets, key=lambda target: (abs(target - r), target)) for r in others}
    own = {r: factors[recipe.stream_of(r)].damped for r in others}
    return refit(weight, {r: goals[nearest[r]] for r in others}, own, others)[0]
