"""Gradients of fake quantization: against the formulas weight by weight, against autograd over the plain steps, and against differences."""

import pytest
import torch
from grids import make_grid
from torch import Tensor

from matquant.codes import SLICINGS, Grid, Slicing, fit_grid, nearest_code, read_rule, slice_codes
from matquant.fake import fake_read, rounded, snapped
from matquant.weight import NestedWeight, Refit

CASES = [(c, r, slicing) for c in (8, 6, 4) for r in (8, 6, 4, 3, 2) if r <= c for slicing in SLICINGS]


def problem(grid: Grid, seed: int = 0, shrink: float = 0.7) -> list[Tensor]:
    """w, s, z, m, u with grid ends that cut some weights off."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 32, generator=g)
    s, z = fit_grid(w.reshape(6, grid.groups(32), -1), grid, torch.float32, shrink)
    assert z is not None
    m, u = 0.7 + torch.rand(s.shape, generator=g) * 0.6, z + torch.randn(s.shape, generator=g)
    return [w, s, z, m, u]


def straight(x: Tensor, y: Tensor) -> Tensor:
    """y on the way forward, x on the way back."""
    return x + (y - x).detach()


def plain_read(w: Tensor, s: Tensor, z: Tensor, m: Tensor, u: Tensor, bits: int, grid: Grid, slicing: Slicing) -> Tensor:
    """The same, step after step, the gradients left to autograd."""
    step, shift = read_rule(bits, grid, slicing)
    t = w.reshape(*s.shape, -1) / s[..., None] + z[..., None]
    q = straight(t, (t + 0.5).floor()).clamp(0, grid.max_code)
    p = straight(q / step, slice_codes(q.detach().to(torch.uint8), bits, grid, slicing).float())
    cut_off = (q / step + 0.5).floor() >= 2**bits  # to a scale and a zero, these are at the top whatever they do
    if slicing == "round" and bits < grid.bits:
        of_weight = w.reshape(*s.shape, -1) / s[..., None].detach() * (t.detach() + 0.5 < grid.max_code + 1)
        p = torch.where(cut_off, straight(of_weight / step, p.detach()), p)
    mid = grid.max_code / 2
    return (s[..., None] * (m[..., None] * (step * p + shift - mid) + mid - u[..., None])).reshape(w.shape)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("parent", "bits", "slicing"), CASES)
def test_reads_as_a_checkpoint_does(parent: int, bits: int, slicing: Slicing, refit: bool) -> None:
    grid = make_grid(parent, 8, symmetric=False)
    w, s, z, m, u = problem(grid)
    codes = nearest_code(w.reshape(*s.shape, -1) / s[..., None] + z[..., None], grid).reshape(w.shape)
    k, v = (m * 128).round(), (u.clamp(min=0) * 2 ** (8 - parent)).round().clamp(0, 255)
    refits = {bits: Refit(k.to(torch.uint8), v.to(torch.uint8))} if refit else {}
    want = NestedWeight(codes, s, z.to(torch.uint8), grid, slicing, refits).read(bits).dense()
    got = fake_read(w, s, z, bits, grid, slicing, k / 128, v * 2.0 ** (parent - 8)) if refit else fake_read(w, s, z, bits, grid, slicing)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("parent", "bits", "slicing"), CASES)
def test_gradients_are_those_of_the_plain_steps(parent: int, bits: int, slicing: Slicing, refit: bool) -> None:
    grid = make_grid(parent, 8, symmetric=False)
    leaves = [x.requires_grad_() for x in problem(grid)[: 5 if refit else 3]]
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    w, s, z = leaves[:3]
    own = tuple(leaves[3:])
    got = torch.autograd.grad((fake_read(w, s, z, bits, grid, slicing, *own) * weights).sum(), leaves)
    m, u = own or (torch.ones_like(s), z)
    want = torch.autograd.grad((plain_read(w, s, z, m, u, bits, grid, slicing) * weights).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize(("parent", "bits", "slicing"), CASES)
def test_gradients_by_hand(parent: int, bits: int, slicing: Slicing) -> None:
    """One weight, one group: the table of the module, with a loop for the code."""
    grid, (step, shift) = make_grid(parent, 1, symmetric=False), read_rule(bits, make_grid(parent, 1, symmetric=False), slicing)
    mid = grid.max_code / 2
    for value in (-3.0, -0.31, 0.0, 0.17, 0.49, 0.99, 2.9):
        s, z, m, u = 1.7 / grid.max_code, float(round(grid.max_code * 0.4)), 1.1, grid.max_code * 0.45
        q = next((q for q in range(grid.max_code) if value / s + z < q + 0.5), grid.max_code)
        inside = -0.5 <= value / s + z < grid.max_code + 0.5
        under = inside and not (slicing == "round" and bits < parent and q + step / 2 >= step * 2**bits)
        p = int(slice_codes(torch.tensor([q], dtype=torch.uint8), bits, grid, slicing))
        a = m * (step * p + shift - mid) + mid - u
        want = [m * inside, a - m * under * value / s, s * m * under, s * (step * p + shift - mid), -s]
        leaves = [torch.full((1, 1), x, requires_grad=True) for x in (value, s, z, m, u)]
        w, scale, zero, *own = leaves
        read = fake_read(w, scale, zero, bits, grid, slicing, *own)
        assert read.item() == pytest.approx(s * a, rel=1e-4, abs=1e-5)
        got = [g.item() for g in torch.autograd.grad(read, leaves)]
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_without_a_refit_scale_and_zero_have_the_gradients_of_lsq() -> None:
    """r = c: (q - z) - w/s and 0 inside, the end's q - z and -s outside."""
    grid = make_grid(4, 1, symmetric=False)
    for value, ds, dz in ((0.23, (6 - 4) - 2.3, 0.0), (9.0, 15 - 4, -0.1), (-9.0, 0 - 4, -0.1)):
        leaves = [torch.full((1, 1), x, requires_grad=True) for x in (value, 0.1, 4.0)]
        got = torch.autograd.grad(fake_read(leaves[0], leaves[1], leaves[2], 4, grid, "floor"), leaves)
        assert [g.item() for g in got] == pytest.approx([float(abs(value) < 2), ds, dz], abs=1e-5)


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_smooth_parts_by_differences(bits: int, slicing: Slicing) -> None:
    """m and u move a read smoothly whatever the codes; s does where no code is near a border, but for the step straight through."""
    grid = make_grid(8, 8, symmetric=False)
    w, s, z, m, u = problem(grid)
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    value = lambda m, u: float((fake_read(w, s, z, bits, grid, slicing, m, u) * weights).double().sum())  # noqa: E731
    leaves = [m.clone().requires_grad_(), u.clone().requires_grad_()]
    got = torch.autograd.grad((fake_read(w, s, z, bits, grid, slicing, *leaves) * weights).sum(), leaves)
    g = torch.Generator().manual_seed(2)
    for index in range(2):
        direction, small = torch.randn(s.shape, generator=g), 1e-2
        ends = [value(*[x + e * direction if i == index else x for i, x in enumerate((m, u))]) for e in (small, -small)]
        assert (ends[0] - ends[1]) / (2 * small) == pytest.approx(float((got[index] * direction).sum()), rel=1e-3, abs=1e-3)


def test_the_slice_at_the_top_passes_gradients_and_the_end_of_the_range_does_not() -> None:
    grid = make_grid(8, 3, symmetric=False)
    w = torch.tensor([[250.0, 255.4, 255.6]], requires_grad=True)  # codes 250, 255 and one that is cut off; the first two are cut by `round` alone
    read = fake_read(w, torch.ones(1, 1), torch.zeros(1, 1), 2, grid, "round")
    assert read.tolist() == [[192.0] * 3]
    read.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_scale_and_zero_know_what_the_slice_cuts_off_at_the_top() -> None:
    """By differences: among weights above the last border of 2 bits, a read is s (192 - z)."""
    grid, w = make_grid(8, 3, symmetric=False), torch.tensor([[230.0, 240.3, 250.0]])
    value = lambda s, z: float(fake_read(w, torch.full((1, 1), s), torch.full((1, 1), z), 2, grid, "round").sum())  # noqa: E731
    s, z = (torch.full((1, 1), x, requires_grad=True) for x in (1.0, 0.0))
    fake_read(w, s, z, 2, grid, "round").sum().backward()
    assert s.grad is not None and s.grad.item() == pytest.approx((value(1.01, 0.0) - value(0.99, 0.0)) / 0.02, rel=1e-3)
    assert z.grad is not None and z.grad.item() == pytest.approx((value(1.0, 1.0) - value(1.0, -1.0)) / 2, rel=1e-3)


def test_frozen_codes_stay_what_they_are() -> None:
    """A weight put where its code reads at full width has that code again, for every code, scale and zero."""
    grid, q = make_grid(8, 256, symmetric=False), torch.arange(256, dtype=torch.uint8)
    for zero in (0, 77, 255):
        for scale in (6e-8, 3e-4, 0.017, 911.0):
            s, z = torch.full((1, 1), scale), torch.full((1, 1), float(zero))
            read = NestedWeight(q[None], s, z.to(torch.uint8), grid, "floor").read(8).dense()
            assert torch.allclose(fake_read(read, s, z, 8, grid, "floor"), read, rtol=1e-5, atol=1e-3 * scale)


def test_roundings_pass_gradients() -> None:
    x = torch.tensor([-0.7, 0.5, 1.49, 300.0], requires_grad=True)
    assert rounded(x, 0, 255).tolist() == [0.0, 1.0, 1.0, 255.0]
    rounded(x, 0, 255).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0] * 4
    s = torch.tensor([1.0001, 1e-9], requires_grad=True)
    assert snapped(s, torch.float16).tolist() == [1.0, 2.0**-24]
    snapped(s, torch.float16).sum().backward()
    assert s.grad is not None and s.grad.tolist() == [1.0, 1.0]


def test_what_is_rounded_is_whole_however_far_it_was() -> None:
    """A stretch that was trained to below 0 is 1, not a little less, which a byte would hold as 0."""
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 300
    assert set(rounded(x, 1, 255).tolist()) <= set(range(1, 256))
    scales = torch.randn(10000, generator=torch.Generator().manual_seed(1)).exp() * 1e5
    assert torch.equal(snapped(scales, torch.float16), snapped(scales, torch.float16).half().float())
