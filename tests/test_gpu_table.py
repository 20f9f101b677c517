"""Choosing a GPU kernel by a table, measuring for it, and `matquant tune`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_mode import CUDA, DEVICE

from matquant import cli
from matquant.errors import InputError, ResourceError
from matquant.kernels.gpu import ops, table, tune
from matquant.kernels.gpu.table import Config, Row
from matquant.kernels.gpu.tune import Product

# No such card: of those that there are, the shipped table may know better.
H200 = Row("NVIDIA H2000", "bfloat16", 2, 16, 4096, 4096, 128, Config("dot", split_k=2), 9.0)


@pytest.fixture(autouse=True)
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one instead of the user's."""
    monkeypatch.setenv(table.USER_VARIABLE, str(tmp_path / "tuned.json"))
    table.forget()
    yield tmp_path / "tuned.json"
    table.forget()


def chosen(
    batch: int = 16, out: int = 4096, in_features: int = 4096, bits: int = 2, dtype: str = "bfloat16", group: int = 128, mma: bool = False
) -> Config:
    return table._choose("NVIDIA H2000", dtype, bits, table.batch_class(batch), batch, out, in_features, group, mma)


def test_the_shipped_table_is_sound_and_claims_nothing_unmeasured() -> None:
    rows = table.load(table.SHIPPED)
    assert all(row.gpu.startswith(("NVIDIA", "AMD")) and row.us > 0 for row in rows)


def test_without_a_measurement_a_labelled_default_is_taken() -> None:
    assert [chosen(batch).kind for batch in (1, 2, 3, 16, 17, 64, 65, 4096)] == ["gemv", "gemv", "dot", "dot", "dot", "dot", "dense", "dense"]
    assert chosen(batch=1, bits=4).kind == "gemv" and chosen(batch=1, bits=6).kind == "dot"
    assert [chosen(batch, mma=True).kind for batch in (1, 8, 9, 16, 17, 65)] == ["mma", "mma", "mma", "mma", "dot", "dense"]
    assert table.choose(torch.device("cpu"), torch.float16, 4, 1, 64, 64, 64) == table.untuned(4, 1)


def test_nearest_measured_product(user_table: Path) -> None:
    wide = Row("NVIDIA H2000", "bfloat16", 2, 16, 28672, 4096, 128, Config("dot", split_k=1), 20.0)
    half = Row("NVIDIA H2000", "float16", 2, 16, 28672, 4096, 128, Config("dot", split_k=8), 20.0)
    coarse = Row("NVIDIA H2000", "bfloat16", 2, 16, 28672, 4096, 4096, Config("dot", split_k=4), 20.0)
    table.save(user_table, [H200, wide, half, coarse])
    assert chosen() == H200.config and chosen(out=5000) == H200.config and chosen(out=20000) == wide.config
    assert chosen(out=28672, dtype="float16") == half.config and chosen(out=28672, group=2048) == coarse.config
    assert chosen(batch=9) == H200.config  # the class of 16
    assert chosen(batch=8) == chosen(batch=32) == H200.config  # a factor of two
    assert chosen(batch=4) == table.untuned(2, 4) and chosen(bits=3) == table.untuned(3, 16)
    table.save(user_table, [Row(**{**vars(H200), "batch": 64, "config": Config("dense")})])
    assert chosen(batch=32).kind == "dense"  # of equals the larger


def test_a_kernel_that_does_not_run_is_not_chosen(user_table: Path) -> None:
    table.save(user_table, [Row(**{**vars(H200), "config": Config("mma", block_m=16)})])
    assert chosen(mma=True).kind == "mma" and chosen().kind == "dot"


def test_a_table_is_extended_and_a_row_replaced(user_table: Path) -> None:
    faster = Row(**{**vars(H200), "config": Config("gemv"), "us": 8.0})
    other = Row(**{**vars(H200), "bits": 4})
    table.save(user_table, [H200, other])
    table.save(user_table, [faster])
    assert set(table.load(user_table)) == {faster, other}
    assert chosen() == faster.config
    assert table.user_file() == user_table


def test_where_the_users_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(table.USER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert table.user_file() == Path("/somewhere/matquant/tuned.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"tuned.json is no table of configurations \(.*\); delete it or run matquant tune"),
        ("{", "tuned.json is no table of configurations"),
        ('{"rows": [{"gpu": "x"}]}', "a row of a tuned table has the fields batch, bits, .*; got .*; delete the file or run matquant tune"),
        (
            json.dumps({"rows": [H200.to_dict() | {"config": {"kind": "dot", "size": 1}}]}),
            "is no configuration .*; delete the file or run matquant tune",
        ),
    ],
)
def test_a_damaged_table(user_table: Path, text: str, message: str) -> None:
    user_table.write_text(text)
    with pytest.raises(InputError, match=message):
        table.load(user_table)


def test_configurations_are_checked() -> None:
    with pytest.raises(InputError, match="block_n is 48; allowed: powers of two"):
        Config("dot", block_n=48)
    with pytest.raises(InputError, match="run is 3; allowed: powers of two"):
        Config("dot", run=3)
    with pytest.raises(InputError, match="is no configuration; allowed: run 1, 2 or 4, split_k and stages from 1, rows and registers from 0"):
        Config("dot", split_k=0)


def test_batch_classes() -> None:
    assert [table.batch_class(batch) for batch in (1, 2, 3, 4, 5, 65, 512, 100000)] == [1, 2, 4, 4, 8, 128, 512, 512]


@pytest.mark.parametrize("batch", [1, 8, 16, 64, 256, 1024])
def test_candidates(batch: int) -> None:
    found = list(tune.candidates(Product(4, batch, 4096, 4096, 128)))
    kinds = {config.kind for config in found}
    assert found[0] == table.untuned(4, batch) and len(found) < 60
    assert ("gemv" in kinds) == (batch <= 8) and ("dense" in kinds) == (batch >= 32)
    assert ("mma" in {config.kind for config in tune.candidates(Product(4, batch, 4096, 4096, 128), True)}) == (batch <= 64)


FEW = [Config("dot", block_n=32, block_m=8, warps=2, stages=1), Config("gemv", block_n=32, block_m=2, block_k=2, warps=2, stages=1)]


def test_tuning_keeps_the_fastest_right_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, broken = Config("dot", block_n=16, block_m=8, warps=1, stages=1), Config("dot", block_n=16, block_m=16, warps=1, stages=1)
    monkeypatch.setattr(tune, "candidates", lambda product, mma: [*FEW, wrong, broken])
    monkeypatch.setattr(tune, "COLD", 0)
    real, times = ops.linear, iter([5.0, 4.0])

    def linear(x: Any, weight: Any, bits: int, bias: Any, config: Config) -> Any:
        if config == broken:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(2, 1, "shared memory")
        return real(x, weight, bits, bias, config) * (2 if config == wrong else 1)

    monkeypatch.setattr(ops, "linear", linear)
    monkeypatch.setattr(tune, "microseconds", lambda calls, device: next(times))
    told: dict[Config, float | None] = {}
    row = tune.tune(Product(3, 3, 40, 160, 32, torch.float16), DEVICE, told.__setitem__)
    assert told == {FEW[0]: 5.0, FEW[1]: 4.0, wrong: None, broken: None}
    assert row == Row(table.gpu_name(DEVICE), "float16", 3, 4, 40, 160, 32, FEW[1], 4.0)
    monkeypatch.setattr(tune, "candidates", lambda product, mma: [wrong])
    with pytest.raises(ResourceError, match="no configuration computes Product.* rightly on .*; report it, and use device cpu meanwhile"):
        tune.tune(Product(3, 3, 40, 160, -1, torch.float16), DEVICE)


def test_an_error_of_ours_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("ours")

    monkeypatch.setattr(ops, "linear", broken)
    with pytest.raises(ValueError, match="ours"):
        tune.tune(Product(3, 1, 8, 32, 32, torch.float16), DEVICE)


def test_copies_exceed_the_cache_and_are_apart() -> None:
    weight = tune.random_weight(4096 if CUDA else 64, 512, 64, 8, DEVICE)
    copies = tune.cold_copies(weight, 4, DEVICE)
    assert sum(copy.read_bytes(4) for copy in copies) > tune.COLD * tune.l2_bytes(DEVICE)
    places = [address for copy in copies for address in copy.addresses(4)]
    assert len(set(places)) == len(places) and not {"pair4", "pair6"} & set(copies[1].arrays)


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(InputError, match="group 48 does not divide 100 input channels; choose one that does, or -1"):
        Product(4, 1, 10, 100, 48)


def test_command(user_table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "candidates", lambda product, mma: FEW[:1])
    monkeypatch.setattr(tune, "COLD", 0)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    common = ["tune", "--shape", "24x64", "--bits", "3", "--batch", "1,2", "--device", str(DEVICE), "--dtype", "float16", "--group-size", "32"]
    assert cli.main(common) == 0
    out = capsys.readouterr().out
    assert "24 x 64" in out and f"written to {user_table}" in out
    assert [(row.batch, row.config) for row in table.load(user_table)] == [(1, FEW[0]), (2, FEW[0])]
    other = user_table.with_name("other.json")
    assert cli.main([*common, "--json", "-o", str(other)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(other) and [row["in"] for row in found["rows"]] == [64, 64]


def test_command_takes_shapes_from_a_checkpoint(want: Path, user_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[Product] = []

    def fake(product: Product, device: torch.device) -> Row:
        tuned.append(product)
        return H200

    monkeypatch.setattr(tune, "tune", fake)
    assert cli.main(["tune", str(want), "--bits", "4", "--batch", "1", "--device", str(DEVICE)]) == 0
    assert {(product.out, product.in_features) for product in tuned} == {(64, 64), (32, 64), (96, 64), (64, 96)}
    assert {product.group for product in tuned} == {32}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--shape", "64"], "shape is '64'; give OUTxIN, for instance 4096x14336", 3),
        (["--shape", "0x4"], "shape is '0x4'", 3),
        ([], "nothing to tune; give a checkpoint, or --shape 4096x14336", 3),
    ],
)
def test_command_refuses(arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *arguments, "--device", str(DEVICE)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(CUDA, reason="CUDA is here")
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--shape", "8x32"]) == 4
    assert "device cuda:0 is not usable here" in capsys.readouterr().err
