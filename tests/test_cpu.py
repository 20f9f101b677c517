"""CPU kernels against the reference: every instruction set at hand, width, group size and odd shape; equal to the bit for any number of threads."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from matquant.codes import Grid
from matquant.errors import InputError, MissingPlanesError, ResourceError
from matquant.kernels import cpu, reference
from matquant.weight import NestedWeight, Refit

SOURCES = Path(cpu.__file__).parent / "csrc"
GROUPS = [32, 64, 128, -1, 20, 48]


def some_weight(
    out: int, in_features: int, grid: Grid, refits: tuple[int, ...] = (), dtype: torch.dtype = torch.float16, seed: int = 0
) -> NestedWeight:
    g = torch.Generator().manual_seed(seed)
    groups = grid.groups(in_features)

    def codes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    scale = (torch.rand(out, groups, generator=g) * 0.01 + 0.001).to(dtype)
    zero = None if grid.symmetric else codes(out, groups, high=2**grid.bits)
    fits = {r: Refit(codes(out, groups, low=64), codes(out, groups, low=100, high=150)) for r in refits}
    return NestedWeight(codes(out, in_features, high=2**grid.bits), scale, zero, grid, "floor", fits)


def rounded(x: Tensor, group: int) -> Tensor:
    """x as the kernels round it: to 127 steps each way, in blocks of 64 channels of a group, or of 32 where a padded group is no multiple of 64."""
    padded = -(-group // 32) * 32
    block = 32 if padded % 64 else 64
    grouped = torch.nn.functional.pad(x.reshape(len(x), -1, group), (0, padded - group)).reshape(len(x), -1, block)
    largest = grouped.abs().amax(-1, keepdim=True)
    q = torch.where(largest > 0, grouped * (127 / largest), 0).round()
    return (q * (largest / 127)).reshape(len(x), -1, padded)[..., :group].reshape(x.shape)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("bits", "symmetric", "overlap"), [(8, False, False), (8, True, False), (8, False, True), (6, False, False), (3, True, False)]
)
def test_every_width(isa: str, group: int, bits: int, symmetric: bool, overlap: bool) -> None:
    in_features = {20: 100, 48: 144, -1: 130}.get(group, 3 * group)
    weight = some_weight(37, in_features, Grid(bits, group, symmetric, overlap), refits=(2, 3))
    packed = cpu.pack(weight, range(2, bits + 1), isa)
    g = torch.Generator().manual_seed(1)
    x, bias = torch.randn(6, in_features, generator=g), torch.randn(37, generator=g)
    size = in_features if group == -1 else group
    for r in range(2, bits + 1):
        dense = weight.read(r).dense().double()
        for exact, inputs in ((True, x), (False, rounded(x, size))):
            want = inputs.double() @ dense.T + bias
            got = cpu.linear(x, packed, r, bias, exact)
            assert torch.allclose(got.double(), want, rtol=1e-4, atol=2e-5 * float(want.abs().max())), (r, exact)
    near = cpu.linear(x, packed, bits, bias)
    assert (near - reference.linear(x, weight.read(bits), bias)).norm() < 0.02 * near.norm()  # what rounding the inputs costs


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_code_is_read_as_the_reference_reads_it(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(1, 2)
    weight = replace(some_weight(16, 32, Grid(8, 32, False, False), refits=(3, 2)), codes=codes)
    packed = cpu.pack(weight, range(2, 9), isa)
    for r in range(2, 9):
        read = cpu.linear(torch.eye(32), packed, r, exact=True).T
        assert torch.allclose(read, weight.read(r).dense(), rtol=1e-6, atol=1e-7), r


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("exact", [False, True])
def test_equal_for_any_number_of_threads_and_rows(isa: str, exact: bool) -> None:
    weight = some_weight(150, 192, Grid(8, 64, False, False), refits=(4, 3, 2))
    packed = cpu.pack(weight, (8, 4, 3, 2), isa, threads=1)
    again = cpu.pack(weight, (8, 4, 3, 2), isa, threads=3)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(0))
    for r in (8, 4, 3, 2):
        whole = cpu.linear(x, packed, r, exact=exact, threads=1)
        for threads in (2, 3, 64):
            assert torch.equal(cpu.linear(x, again, r, exact=exact, threads=threads), whole)
        rows = torch.cat([cpu.linear(x[i : i + 1], packed, r, exact=exact) for i in range(9)])
        assert torch.equal(rows, whole)
        assert torch.equal(cpu.linear(x.reshape(3, 3, 192), packed, r, exact=exact), whole.reshape(3, 3, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_scales_and_inputs(dtype: torch.dtype) -> None:
    weight = some_weight(20, 64, Grid(8, 32, False, False), dtype=dtype)
    weight = replace(
        weight, scale=weight.scale.flatten().index_fill(0, torch.tensor([0, 3]), 2.0**-24).reshape(weight.scale.shape)
    )  # subnormal halves
    packed = cpu.pack(weight, (8, 4))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for r in (8, 4):
        want = x.float() @ weight.read(r).dense().T
        got = cpu.linear(x, packed, r, exact=True)
        assert got.dtype == dtype and torch.allclose(got.float(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_only_planes_that_are_wanted_are_held_and_read() -> None:
    weight = some_weight(160, 1024, Grid(8, 64, False, False), refits=(4, 3, 2))
    weights, groups = 160 * 1024, 160 * 16
    for r in (2, 3, 4, 6, 8):
        packed = cpu.pack(weight, (r,), "scalar")
        metadata = groups * (2 + (2 if r <= 4 else 1))  # a scale of two bytes; two bytes of a refit, or a zero
        assert packed.nbytes == packed.read_bytes(r) == weights * r // 8 + metadata
    elastic = cpu.pack(weight, (8, 4, 3, 2), "scalar")
    assert elastic.nbytes == weights + groups * (2 + 1 + 2 * 3)
    assert [elastic.read_bytes(r) - groups * 2 for r in (8, 4, 3, 2)] == [weights + groups, *(weights * r // 8 + 2 * groups for r in (4, 3, 2))]


def test_one_width_needs_no_planes_below_it() -> None:
    whole = some_weight(16, 64, Grid(8, 64, False, False), refits=(3,))
    partial = replace(whole, codes=whole.codes & 0b11100000, planes=3)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.linear(x, cpu.pack(partial, (3,)), 3), cpu.linear(x, cpu.pack(whole, (8, 3)), 3))


def test_zero_inputs_and_large_ones() -> None:
    packed = cpu.pack(some_weight(8, 64, Grid(8, 32, False, False)), (8,))
    assert torch.equal(cpu.linear(torch.zeros(2, 64), packed, 8), torch.zeros(2, 8))
    assert cpu.linear(torch.full((1, 64), 1e30), packed, 8).isfinite().all()
    assert cpu.linear(torch.zeros(0, 64), packed, 8).shape == (0, 8)


def test_refusals() -> None:
    weight = some_weight(8, 64, Grid(8, 64, False, False))
    with pytest.raises(InputError, match="CPU kernels read slicing floor, not round; use the reference kernel"):
        cpu.pack(replace(weight, slicing="round"), (8,))
    with pytest.raises(MissingPlanesError, match="4 bits need planes 0-3, but only 0-2 are here; get the missing plane files"):
        cpu.pack(replace(weight, planes=3), (4, 2))
    with pytest.raises(MissingPlanesError, match="3 bits were not packed; choose from 8, 4"):
        cpu.linear(torch.zeros(1, 64), cpu.pack(weight, (8, 4)), 3)
    with pytest.raises(ResourceError, match=r"this machine or build has no avx1; choose from .*scalar"):
        cpu.pack(weight, (8,), "avx1")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    assert not cpu.available()
    with pytest.raises(ResourceError, match=r"CPU kernels were not built; reinstall matquant where a C\+\+ compiler is at hand"):
        cpu.isas()
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert cpu.available()


def test_random_shapes_under_sanitizers(tmp_path: Path) -> None:
    """A program of its own, csrc/fuzz.cpp, with arrays of exactly the layout's sizes."""
    import cmake

    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    build = [
        program,
        "-G",
        "Unix Makefiles",
        "-S",
        str(SOURCES),
        "-B",
        str(tmp_path),
        "-DMQ_SANITIZE=ON",
        "-DMQ_FUZZ=" + str(Path(__file__).parent / "csrc" / "fuzz.cpp"),
    ]
    for command in (build, [program, "--build", str(tmp_path), "--target", "fuzz", "--parallel", "2"]):
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    run = subprocess.run(
        [str(tmp_path / "fuzz"), "1000"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "000 products equal" in run.stdout
