"""The joint loss on a model of one layer, against the same by hand."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from matquant.joint import MIXED, Joint
from matquant.losses import distance, next_token

IDS = torch.tensor([[1, 2, 3, 0], [0, 3, 2, 1]])


class Toy(nn.Module):
    """Logits of a table, pushed by the width at which it is read."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
        self.bits, self.read = 8, []

    def forward(self, ids: Tensor) -> Tensor:
        self.read.append(self.bits)
        return self.table[ids] + self.bits * torch.arange(4) / 10


def at(toy: Toy, bits: int) -> Tensor:
    toy.bits = bits
    return toy(IDS)


def test_every_width_after_the_other_widest_first() -> None:
    toy = Toy()
    joint = Joint({"": toy}, {2: 1.0, 8: 0.1, 4: 0.5})
    parts = []
    for part in joint.parts(toy, IDS, 0):
        assert toy.read == [8, 4, 2][: len(toy.read)]  # the next width waits for the backward of this one
        parts.append(part)
    assert [part.bits for part in parts] == [8, 4, 2] and joint.passes == 3
    for part, lam in zip(parts, (0.1, 0.5, 1.0), strict=True):
        want = next_token(at(toy, part.bits), IDS).item()
        assert part.loss == pytest.approx(want) and part.weighted.item() == pytest.approx(lam * want)


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize(("targets", "passes"), [({8: 1.0, 4: 1.0, 2: 1.0}, 3), ({4: 1.0, 2: 1.0}, 3), ({2: 1.0}, 2)])
def test_a_width_teaches_another(truth: bool, targets: dict[int, float], passes: int) -> None:
    """Run once where it is trained as well, else once more; without gradients of its own."""
    toy = Toy()
    parts = list(Joint({"": toy}, targets, {2: 8}, truth, "kl", 2.0).parts(toy, IDS, 0))
    assert len(toy.read) == passes and toy.read[-1] == 2
    got = torch.autograd.grad(parts[-1].weighted, toy.table)[0]
    student, teacher = at(toy, 2), at(toy, 8).detach()
    want = distance(student, teacher, "kl", 2.0) + (next_token(student, IDS) if truth else 0)
    assert parts[-1].loss == pytest.approx(want.item())
    assert torch.allclose(got, torch.autograd.grad(want, toy.table)[0], atol=1e-6)
    for part in parts[:-1]:
        assert part.loss == pytest.approx(next_token(at(toy, part.bits), IDS).item())


def test_the_original_teaches() -> None:
    toy, original = Toy(), Toy(1)
    (part,) = Joint({"": toy}, {2: 1.0}, {2: 0}, truth=False, original=original).parts(toy, IDS, 0)
    assert part.loss == pytest.approx(distance(at(toy, 2), original(IDS), "kl", 1.0).item())
    assert original.table.grad is None


def test_random_widths_are_drawn_by_their_weights() -> None:
    layers = {str(i): Toy() for i in range(500)}
    model = layers["0"]
    joint = Joint(layers, {8: 1.0, 4: 2.0, 2: 1.0}, random_width=True)
    drawn = []
    for step in (3, 3, 4):
        (part,) = joint.parts(model, IDS, step)
        assert part.bits == MIXED and joint.passes == 1
        drawn.append([layer.bits for layer in layers.values()])
    assert drawn[0] == drawn[1] != drawn[2]
    counts = Counter(drawn[0])
    assert set(counts) == {8, 4, 2} and 0.4 < counts[4] / 500 < 0.6


def test_random_widths_are_taught_by_the_widest() -> None:
    toy = Toy()
    (part,) = Joint({"": toy}, {4: 1.0, 2: 1.0}, {2: 4, 4: 8}, truth=False, random_width=True).parts(toy, IDS, 0)
    assert toy.read[0] == 8 and len(toy.read) == 2
    assert part.loss == pytest.approx(distance(at(toy, toy.read[1]), at(toy, 8), "kl", 1.0).item())


def test_balanced_weights_make_gradients_equal() -> None:
    joint = Joint({}, {8: 0.5, 4: 1.0, 2: 1.0}, norms={8: 0.01, 4: 0.1, 2: 10.0})
    weights = joint.weights
    assert sum(weights.values()) == pytest.approx(2.5)
    assert weights[4] * 0.1 == pytest.approx(weights[2] * 10.0) and weights[8] * 0.01 == pytest.approx(weights[4] * 0.1 / 2)
