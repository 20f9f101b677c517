"""Proxies against slow references."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from matquant.checkpoint import Checkpoint
from matquant.errors import InputError
from matquant.report import Report
from matquant.search import proxies
from matquant.search.probe import Probe
from matquant.search.units import examine

Rounded = Callable[[str], Path]
IDS = (torch.arange(3 * 10).reshape(3, 10) * 31 + 7) % 250
WIDTHS = (8, 3, 2)


@pytest.fixture(scope="module")
def checkpoint(rounded: Rounded) -> Checkpoint:
    return Checkpoint.open(rounded("llama"))


def test_round_off_is_the_distance_to_the_widest_read(checkpoint: Checkpoint) -> None:
    units = examine(checkpoint).units
    found = proxies.round_off(checkpoint, units, WIDTHS)
    for i in (0, 2):
        parts = [(checkpoint.read(name).read(8).dense(), checkpoint.read(name).read(2).dense()) for name in units[i].layers]
        want = sum(float(((a - b) ** 2).sum()) for a, b in parts) / sum(float((a**2).sum()) for a, _ in parts)
        assert found[i, 2] == pytest.approx(want, rel=1e-5)
    assert (found[:, 0] == 0).all() and (found[:, 2] > found[:, 1]).all()


def test_output_error_is_that_of_the_report(want: Path, rounded: Rounded) -> None:
    checkpoint = Checkpoint.open(want)  # at 3 and 2 bits
    units = examine(checkpoint).units
    found = proxies.output_error(checkpoint, units, (3, 2))
    report = Report.from_dict(json.loads((want / "report.json").read_text()))
    errors = {layer.name: layer.errors for layer in report.layers}
    assert (found[:, 0] == 0).all()
    assert found[1, 1] == pytest.approx(sum((errors[name][2] or 0) - (errors[name][3] or 0) for name in units[1].layers))
    with pytest.raises(InputError, match="has no report of its layers' errors"):
        proxies.output_error(Checkpoint.open(rounded("llama")), examine(Checkpoint.open(rounded("llama"))).units, WIDTHS)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fisher_is_the_square_of_every_tokens_gradient(kind: str, rounded: Rounded) -> None:
    """Token by token and weight by weight: gradients of drawn tokens' log-probabilities through one layer, each input token by itself."""
    probe = Probe(Checkpoint.open(rounded(kind)), examine(Checkpoint.open(rounded(kind))).units, IDS)
    found = proxies.fisher(probe, WIDTHS, seed=5)
    unit = next(i for i, unit in enumerate(probe.units) if unit.block == 1)
    layer = probe.layers[probe.units[unit].layers[0]]
    assert len(probe.units[unit].layers) == 1 and len(probe.texts) == 1
    name = probe.units[unit].layers[0]
    caught: list[torch.Tensor] = []

    def hook(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        caught.append(args[0].detach().flatten(0, -2))
        caught.append(output.detach().requires_grad_())
        return caught[1]

    handle = layer.register_forward_hook(hook)
    logits = probe.model(IDS[:, :-1], use_cache=False).logits.flatten(0, 1)
    handle.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(1, drawn).sum(), caught[1])
    information = torch.zeros(len(gradient.flatten(0, -2)[0]), caught[0].shape[1])
    for x, d in zip(caught[0], gradient.flatten(0, -2), strict=True):
        information += torch.outer(d, x) ** 2
    change = probe.checkpoint.read(name).read(2).dense() - probe.checkpoint.read(name).read(8).dense()
    want = 0.5 * float((information * change**2).sum()) / len(drawn)
    assert found[unit, 2] == pytest.approx(want, rel=1e-3)
    assert (found[:, 0] == 0).all() and (found[:, 1:] > 0).all()


def test_fisher_ranks_as_kl_does(checkpoint: Checkpoint) -> None:
    """An estimate of KL to second order: of the right size in the mean over units."""
    probe = Probe(checkpoint, examine(checkpoint).units, (torch.arange(8 * 24).reshape(8, 24) * 31 + 7) % 250)
    kl = np.array([float(probe.kl({i: 3}).mean()) for i in range(len(probe.units))])
    guess = np.mean([proxies.fisher(probe, WIDTHS, seed)[:, 1] for seed in range(3)], 0)
    assert 0.4 < guess.sum() / kl.sum() < 2.5
    assert np.corrcoef(np.log(guess), np.log(kl))[0, 1] > 0.5
