import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matquant.codes import Grid, Slicing, read_affine, slice_codes
from matquant.errors import RecipeError
from matquant.overflow import Cost, SparseOverflow, costs, entropy_bits, published_bits
from matquant.weight import AffineWeight, NestedWeight


def some_codes(rows: int, columns: int, bits: int, share: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    return codes.masked_fill(torch.rand(rows, columns, generator=g) < share, 2**bits)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(2, 7), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_codes_come_back(rows: int, columns: int, bits: int, share: float, seed: int) -> None:
    codes = some_codes(rows, columns, bits, share, seed)
    assert torch.equal(SparseOverflow.of(codes, bits).codes(), codes)


def test_by_hand() -> None:
    codes = torch.zeros(2, 40, dtype=torch.uint8)
    for row, column in [(0, 3), (0, 17), (0, 31), (1, 39)]:
        codes[row, column] = 4
    made = SparseOverflow.of(codes, 2)
    assert made.starts.tolist() == [0, 3, 4]
    assert made.places.tolist() == [3 | 1 << 4, 15 | 7 << 4]  # 17 = 16 + 1, 31 = 16 + 15, 39 = 32 + 7
    # tiles of row 0: one entry, two, none; of row 1: none, none, one; a zero ends each
    assert made.counts.tolist() == [0b00001101, 0b01]
    assert torch.stack(made.entries(), 1).tolist() == [[0, 3], [0, 17], [0, 31], [1, 39]]


def test_a_row_begins_where_the_text_says() -> None:
    made = SparseOverflow.of(some_codes(7, 50, 3, 0.2, 1), 3)
    stream = "".join(f"{byte:08b}"[::-1] for byte in made.counts.tolist())
    for row in range(7):
        first = row * 4 + int(made.starts[row])
        own = stream[first : (row + 1) * 4 + int(made.starts[row + 1])]
        assert own.count("0") == 4
        assert own.count("1") == int(made.starts[row + 1] - made.starts[row])


def test_the_product_is_that_of_the_dense_weight() -> None:
    grid = Grid(8, 16, symmetric=False, overlap=False)
    g = torch.Generator().manual_seed(3)
    parent = torch.randint(0, 256, (24, 64), generator=g, dtype=torch.uint8)
    scale, zero = torch.rand(24, 4, generator=g) + 0.1, torch.randint(0, 256, (24, 4), generator=g, dtype=torch.uint8)
    p = slice_codes(parent, 2, grid, "round-overflow")
    assert int(p.max()) == 4
    affine = read_affine(scale, zero, 2, grid, "round-overflow")
    x = torch.randn(5, 64, generator=g)
    torch.testing.assert_close(SparseOverflow.of(p, 2).product(x, *affine), x @ AffineWeight(p, *affine, 2).dense().T, rtol=1e-4, atol=1e-2)


def test_what_it_costs() -> None:
    """Of normal weights on a grid that spans four standard deviations, some percent overflow."""
    codes = some_codes(512, 4096, 2, 0.05, 0)
    made, share = SparseOverflow.of(codes, 2), float((codes == 4).float().mean())
    per_weight = made.stored_bits / codes.numel()
    assert per_weight == pytest.approx(2 + 5 * share + 1 / 16 + 32 / 4096, abs=1e-3)
    assert published_bits(2, share) == pytest.approx(2.05, abs=2e-3)
    assert entropy_bits(2, share) == pytest.approx(2.286, abs=5e-3)
    assert entropy_bits(2, share) < per_weight < 2.33
    assert entropy_bits(2, 0.0) == 2


def test_codes_that_are_too_large() -> None:
    with pytest.raises(RecipeError, match=r"a code is 5; 2 bits with overflow hold at most 4"):
        SparseOverflow.of(torch.tensor([[5]], dtype=torch.uint8), 2)


def nested(slicing: Slicing, rows: int) -> NestedWeight:
    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, 64), generator=g, dtype=torch.uint8)
    return NestedWeight(codes, torch.ones(rows, 4), None, Grid(8, 16, symmetric=True, overlap=False), slicing)


def test_costs_of_a_model() -> None:
    weights = [nested("round-overflow", 8), nested("round-overflow", 24)]
    found = costs(iter(weights), (8, 4, 2))
    assert list(found) == [4, 2]  # 8 bits are the parent's own: nothing is rounded up
    all_codes = torch.cat([w.codes for w in weights]).int()
    assert found[2].share == pytest.approx(float(((all_codes + 32) >> 6 == 4).float().mean()))
    stored = sum(SparseOverflow.of(w.read(2).codes, 2).stored_bits for w in weights)
    assert found[2] == Cost(found[2].share, stored / (32 * 64))
    assert costs([nested("round", 8), nested("floor", 8)], (8, 4, 2)) == {}
