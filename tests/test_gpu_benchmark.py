"""benchmarks/gpu runs from end to end on tiny sizes, interpreted where there is no CUDA: all its branches but the peers'."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from triton_mode import CUDA, DEVICE

from matquant.kernels.gpu import table, tune
from matquant.kernels.gpu.table import Config


@pytest.fixture(scope="module")
def products(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/gpu/products.py")


@pytest.fixture(autouse=True)
def tiny_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies, one round, and blocks that need few interpreted programs."""
    monkeypatch.setenv(table.USER_VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "COLD", 0)
    few = Config("dot", block_n=128, block_m=8, warps=4, stages=1)
    monkeypatch.setattr(table, "UNTUNED", ((1 << 20, few),))
    monkeypatch.setattr(table, "GEMV_BATCH", 0)
    monkeypatch.setattr(tune, "candidates", lambda product, mma: [few])
    table.forget()


def test_the_benchmark_runs(products: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "results.json", tmp_path / "results.svg"
    sizes = ["--shapes", "40x64,24x64", "--batches", "1,3", "--bits", "2,4", "--group-size", "32", "--decode", "32,48,1,2,1,40", "--context", "8"]
    found = products.main(["--out", str(out), "--plot", str(plot), "--device", str(DEVICE), "--dtype", "float16", "--decode-tokens", "1", *sizes])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert [(row["shape"], row["batch"], row["kernel"], row["bits"]) for row in found["rows"]] == [
        (shape, batch, kernel, bits)
        for batch in (1, 3) for shape in ("40x64", "24x64") for kernel, bits in (("float16", 16), ("matquant", 2), ("matquant", 4))
    ]  # fmt: skip
    assert all(row["us"] > 0 for row in found["rows"]) and [row["bits"] for row in found["decode"]] == [2, 4, 16]
    assert found["interpreted"] == (not CUDA) and found["machine"]["copy_gigabytes_per_second"] > 0 and not found["left_out"]
    assert plot.read_bytes().startswith(b"<?xml")
    printed = capsys.readouterr().out
    assert "| 40x64 | 3 |" in printed and "| decode, bits | tokens/s |" in printed


def test_what_there_is_no_time_for_is_named(products: ModuleType) -> None:
    results = products.Results()
    options = products.arguments(["--out", "x", "--device", str(DEVICE), "--shapes", "8x32", "--batches", "1"])
    products.products(options, results, until=0.0)
    assert results.left_out == ["8x32 at batch 1"] and not results.rows


def test_tuning_comes_first_where_it_is_asked_for(products: ModuleType) -> None:
    options = products.arguments(["--out", "x", "--device", str(DEVICE), "--dtype", "float16", "--group-size", "32", "--tune"])
    row = products.ours(24, 64, 2, 3, options)
    assert [(r.bits, r.batch, r.out, r.us > 0) for r in table.load(table.user_file())] == [(3, 2, 24, True)] and row["bytes"] == 24 * 192 + 24 * 2 * 3


def test_a_wrong_product_is_no_result(products: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "right", lambda *_: False)
    options = products.arguments(["--out", "x", "--device", str(DEVICE), "--dtype", "float16", "--group-size", "32"])
    with pytest.raises(RuntimeError, match="wrong product: 8 x 32, batch 1, 2 bits"):
        products.ours(8, 32, 1, 2, options)


def test_targets_and_tables_from_stored_rows(products: ModuleType) -> None:
    def row(kernel: str, bits: int, batch: int, us: float) -> dict[str, object]:
        return {"kernel": kernel, "bits": bits, "batch": batch, "us": us, "shape": "8192x8192", "bytes": 1}

    results = products.Results(
        [row("matquant", 2, 1, 8.0), row("matquant", 2, 16, 11.0), row("matquant", 2, 256, 90.0), row("bfloat16", 16, 256, 90.0)]
    )
    reached = products.targets(results)
    assert [(t["target"], t["met"]) for t in reached] == [(8.5, True), (1.3, False), (0.9, True)]
    assert "| 2 | batch 16 over batch 1, at most | 1.3 | 1.38 | no |" in products.shown(results, reached)
    assert products.targets(products.Results()) == []


def test_a_peer_that_fails_costs_nothing_else(products: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise ImportError("of another version")

    options = products.arguments(["--out", "x", "--shapes", "8x32", "--batches", "1", "--bits", "2", "--group-size", "32"])
    options.device, results = "cpu", products.Results()
    monkeypatch.setattr(products, "PEERS", {"json": (4, broken)})
    monkeypatch.setattr(products, "dense_us", lambda *_: 1.0)
    monkeypatch.setattr(products, "ours", lambda *_: {"kernel": "matquant", "bits": 2, "us": 1.0})
    monkeypatch.setattr(products, "torch", SimpleNamespace(device=lambda name: SimpleNamespace(type="cuda"), bfloat16=torch.bfloat16, cuda=SimpleNamespace(empty_cache=lambda: None)))  # fmt: skip
    products.products(options, results, until=float("inf"))
    assert results.left_out == ["json on 8x32: ImportError: ['of another version']"] and len(results.rows) == 2
