"""Perplexity, KL and top-1 against float64 loops over every position and token."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from building import build_checkpoint
from grids import make_grid
from torch import Tensor

from matquant import evaluate as ev
from matquant import hf
from matquant.checkpoint import Checkpoint
from matquant.errors import InputError, MissingPlanesError, PlanError
from matquant.evaluate import ORIGINAL, Protocol, Quality, Sizes, evaluate, logits_of, measure, windows
from matquant.plan import BitPlan, Layout, Shape
from matquant.recipe import Recipe

VOCABULARY = 11


def toy(seed: int, noise: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Logits that depend on the last two tokens: a model in one line."""
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    table = table + noise * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed + 1))
    return lambda ids: table[torch.cat([ids[:, :1], ids[:, :-1]], 1), ids]


def text(samples: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(5))


def measure_slowly(model: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], sequences: Tensor) -> Quality:
    """Plain Python floats: one sequence, one position, one token at a time."""
    nll, kl, agree = [], [], []
    for ids in sequences:
        q_logits, p_logits = model(ids[None])[0].tolist(), reference(ids[None])[0].tolist()
        for i in range(len(ids) - 1):
            q_sum, p_sum = sum(math.exp(x) for x in q_logits[i]), sum(math.exp(x) for x in p_logits[i])
            q, p = [math.exp(x) / q_sum for x in q_logits[i]], [math.exp(x) / p_sum for x in p_logits[i]]
            nll.append(-math.log(q[int(ids[i + 1])]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agree.append(p.index(max(p)) == q.index(max(q)))
    worst = sorted(kl)[math.ceil(0.999 * len(kl)) - 1]
    return Quality("", math.exp(sum(nll) / len(nll)), sum(kl) / len(kl), worst, sum(agree) / len(agree))


def close(found: Quality, wanted: Quality) -> bool:
    pairs = zip((found.perplexity, found.kl, found.kl_p999, found.top1), (wanted.perplexity, wanted.kl, wanted.kl_p999, wanted.top1), strict=True)
    return all(a == b or (a is not None and b is not None and a == pytest.approx(b, rel=2e-5, abs=1e-6)) for a, b in pairs)


def switched(models: dict[str, Callable[[Tensor], Tensor]]) -> tuple[Callable[[Tensor], Tensor], list[tuple[str, Callable[[], None]]]]:
    """One callable that stands for several models, and the settings that switch it."""
    current: list[str] = []

    def model(ids: Tensor) -> Tensor:
        return models[current[-1]](ids)

    return model, [(name, lambda name=name: current.append(name)) for name in models]


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    ids = torch.arange(11)
    assert windows(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(ids, 4, limit=1).tolist() == [[0, 1, 2, 3]]
    assert windows(ids, 4, bos_id=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert windows(ids, 4, bos_id=99, limit=2).shape == (2, 4)
    assert windows(ids, 11).shape == (1, 11)


def test_windows_refuses_a_text_that_is_too_short() -> None:
    with pytest.raises(InputError, match="the text has 3 tokens, fewer than one sequence of 4; give more text or a smaller --seq-len"):
        windows(torch.arange(3), 4)
    with pytest.raises(InputError, match="the text has 0 tokens"):
        windows(torch.arange(0), 4)
    with pytest.raises(InputError, match="sequences of 1 tokens predict nothing"):
        windows(torch.arange(9), 1)


def test_protocol_says_how() -> None:
    assert Protocol.of(text(3, 8), 256, "wiki.txt") == Protocol(8, 8, 21, 3, "token 256 leads every sequence", "wiki.txt")
    assert Protocol.of(text(3, 8), None, "wiki.txt").bos == "none"


# --- measure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (3, 7), (5, 40)])
def test_measure_against_loops(samples: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "BATCH_TOKENS", 2 * length)  # batches of two, the last one of one
    monkeypatch.setattr(ev, "CHUNK_ELEMENTS", 3 * VOCABULARY)  # three positions at a time
    sequences, original = text(samples, length), toy(0)
    models = {"a": toy(0, 0.3), "b": toy(7)}
    model, settings = switched(models)
    first, *found = measure(model, original, sequences, settings)
    assert [quality.label for quality in found] == ["a", "b"]
    for quality in found:
        assert close(quality, measure_slowly(models[quality.label], original, sequences))
    assert first == Quality(ORIGINAL, first.perplexity, 0.0, 0.0, 1.0)
    assert close(first, measure_slowly(original, original, sequences))
    (alone,) = measure(model, None, sequences, settings[:1])
    assert alone == Quality("a", found[0].perplexity, None, None, None)


def test_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = text(6, 30)
    model, settings = switched({"a": toy(0, 0.5)})
    whole = measure(model, toy(0), sequences, settings)
    monkeypatch.setattr(ev, "BATCH_TOKENS", 1)
    monkeypatch.setattr(ev, "CHUNK_ELEMENTS", 1)
    assert all(close(a, b) for a, b in zip(measure(model, toy(0), sequences, settings), whole, strict=True))


def test_the_reference_runs_once_a_batch_and_progress_counts_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "BATCH_TOKENS", 10)
    runs, steps = [0], []
    original = toy(0)

    def counted(ids: Tensor) -> Tensor:
        runs[0] += 1
        return original(ids)

    model, settings = switched({"a": toy(1), "b": toy(2)})
    measure(model, counted, text(4, 5), settings, progress=lambda done, total: steps.append((done, total)))
    assert runs == [2]
    assert steps == [(i, 6) for i in range(1, 7)]


def test_the_worst_positions_are_a_quantile_not_the_mean() -> None:
    sequences = text(20, 101)
    flat = torch.zeros(VOCABULARY)
    spike = torch.zeros(VOCABULARY)
    spike[3] = 9.0

    def sometimes(ids: Tensor) -> Tensor:
        """Off at one position of each sequence: 20 of 2000, so the 99.9 % quantile is one of them."""
        logits = flat.repeat(*ids.shape, 1)
        logits[:, 50] = spike
        return logits

    (_, found) = measure(sometimes, lambda ids: flat.repeat(*ids.shape, 1), sequences, [("2", lambda: None)])
    assert found.kl_p999 is not None and found.kl is not None
    assert found.kl == pytest.approx(found.kl_p999 / 100, rel=1e-4)


def test_tokens_that_are_masked_out_count_nothing() -> None:
    def masked(ids: Tensor) -> Tensor:
        logits = toy(0)(ids).clone()
        logits[..., -1] = float("-inf")
        return logits

    ids = text(2, 9).clamp(max=VOCABULARY - 2)
    found = measure(masked, masked, ids, [("8", lambda: None)])[1]
    assert found.kl == 0 and math.isfinite(found.perplexity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_their_place(bad: float) -> None:
    def broken(ids: Tensor) -> Tensor:
        logits = toy(0)(ids).clone()
        logits[0, 4, 2] = bad
        return logits

    with pytest.raises(
        InputError, match=r"the logits of the checkpoint \(2\) are not finite in sequence 0, position 0 or soon after; try --dtype float32"
    ):
        measure(broken, None, text(2, 9), [("2", lambda: None)])
    with pytest.raises(InputError, match="the logits of the original are not finite"):
        measure(toy(0), broken, text(2, 9), [("2", lambda: None)])


def test_a_hopeless_model_still_gets_a_number() -> None:
    (found,) = measure(lambda ids: -1e4 * torch.nn.functional.one_hot(ids.roll(-1, 1), VOCABULARY).float(), None, text(2, 9), [("2", lambda: None)])
    assert math.isfinite(found.perplexity)


def test_another_vocabulary_is_refused() -> None:
    def narrow(ids: Tensor) -> Tensor:
        return toy(0)(ids)[..., :-1]

    with pytest.raises(InputError, match="the reference predicts 10 tokens, the checkpoint 11; give the model that was quantized"):
        measure(toy(0), narrow, text(1, 4).clamp(max=9), [("2", lambda: None)])
    with pytest.raises(InputError, match="the text holds token 10, but the original predicts 10; use the tokenizer that belongs to it"):
        measure(toy(0), narrow, text(1, 4), [("2", lambda: None)])
    with pytest.raises(InputError, match="1 sequences of 1 tokens predict nothing"):
        measure(toy(0), None, text(1, 1), [])


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    shapes = {"q": Shape(64, 128), "down": Shape(128, 64)}
    layout = Layout(make_grid(8, 64), "floor", (8, 4, 2), (2,), "float16")
    sizes = Sizes(shapes, layout, other_weights=1000, other_bytes=2000, original_bits=16)
    quality = Quality("4", 9.0, 0.1, 0.5, 0.9)
    row = sizes.row(quality, BitPlan(4), 777)
    assert (row.label, row.bits, row.file_bytes, row.perplexity, row.kl, row.kl_p999, row.top1) == ("4", 4, 777, 9.0, 0.1, 0.5, 0.9)
    assert row.bits_per_weight == 4 + 16 / 64
    assert row.bits_per_weight_model == ((4 + 16 / 64) * 16384 + 16000) / 17384
    assert sizes.row(quality, BitPlan(2), 1).bits_per_weight == 2 + 32 / 64  # a refit's two bytes count
    mixed = sizes.row(quality, BitPlan(4, {"q": 8}), 1)
    assert mixed.bits is None and mixed.bits_per_weight == 6 + 16 / 64
    assert sizes.row(quality, BitPlan(4, {"q": 2, "down": 2}), 1).bits == 2
    original = sizes.original(Quality(ORIGINAL, 8.0, 0.0, 0.0, 1.0))
    assert (original.label, original.bits, original.bits_per_weight, original.bits_per_weight_model) == ("16", 16, 16, 16)
    assert original.file_bytes == 2 * 17384
    assert replace(sizes, original_bits=32).original(quality).label == "32"


# --- a checkpoint ---------------------------------------------------------------------------------------------------

RECIPE = Recipe(method="minmax", group_size=32)


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "checkpoint"
    build_checkpoint(tiny("llama"), folder, RECIPE)
    return folder


def original_of(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def test_evaluate_one_load_all_widths_and_plans(made: Path, tiny: Callable[[str], Path]) -> None:
    reference = original_of(tiny("llama"))
    sequences = text(3, 24, 258)
    layer = "model.layers.0.mlp.down_proj"
    first, *rows = evaluate(made, [8, BitPlan(4), 2, BitPlan(2, {layer: 6})], sequences, reference)
    assert [row.label for row in (first, *rows)] == ["32", "8", "4", "2", "2-6 mixed"]
    assert [row.bits for row in rows] == [8, 4, 2, None]
    assert (first.kl, first.top1) == (0, 1)
    wanted = measure_slowly(logits_of(reference), logits_of(reference), sequences)
    assert first.perplexity == pytest.approx(wanted.perplexity, rel=1e-5)
    for row, bits in zip(rows, [8, 4, 2, BitPlan(2, {layer: 6})], strict=True):
        alone = hf.from_pretrained(made, bits, dtype="float32").eval()
        with torch.inference_mode():
            assert close(
                Quality("", row.perplexity, row.kl, row.kl_p999, row.top1), measure_slowly(logits_of(alone), logits_of(reference), sequences)
            )
    assert rows[0].kl < rows[1].kl < rows[2].kl  # type: ignore[operator]
    checkpoint = Checkpoint.open(made)
    assert [row.file_bytes for row in rows] == [checkpoint.bytes_for(bits) for bits in (8, 4, 2, 6)]
    assert rows[0].bits_per_weight == 8 + 24 / 32 and rows[1].bits_per_weight == 4 + 32 / 32
    assert rows[0].bits_per_weight < rows[0].bits_per_weight_model < 32


def test_sizes_of_a_checkpoint(made: Path, tiny: Callable[[str], Path]) -> None:
    sizes = Sizes.of(Checkpoint.open(made))
    total = sum(parameter.numel() for parameter in original_of(tiny("llama")).parameters())
    assert sizes.original_bits == 32
    assert sizes.quantized_weights + sizes.other_weights == total
    assert sizes.original(Quality(ORIGINAL, 1.0, None, None, None)).file_bytes == 4 * total


def test_evaluate_without_a_reference_and_with_names(made: Path) -> None:
    (row,) = evaluate(made, {"mine.json": BitPlan(3)}, text(2, 16, 258))
    assert row.label == "mine.json" and row.bits == 3 and row.kl is None and row.top1 is None and row.perplexity > 1


def test_evaluate_refuses(made: Path, tmp_path: Path) -> None:
    good = text(1, 8, 258)
    with pytest.raises(PlanError, match="the plan gives default 5 bits; choose from 8, 6, 4, 3, 2"):
        evaluate(made, [8, 5], good)
    with pytest.raises(PlanError, match="the plan names layer 'nope'"):
        evaluate(made, [BitPlan(4, {"nope": 4})], good)
    with pytest.raises(InputError, match="no widths to measure"):
        evaluate(made, [], good)
    with pytest.raises(InputError, match="sequences of 200 tokens, but the model has 128 positions; use --seq-len 128 or less"):
        evaluate(made, [4], text(1, 200, 258))
    with pytest.raises(InputError, match="the text holds token 300, but the model knows 258"):
        evaluate(made, [4], torch.tensor([[1, 300]]))
    with pytest.raises(InputError):
        evaluate(tmp_path, [4], good)


def test_a_partial_folder_is_measured_at_the_widths_it_has(made: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "partial"
    shutil.copytree(made, folder)
    for file in Checkpoint.open(made).files_for(8):
        if file not in Checkpoint.open(made).files_for(3):
            (folder / file).unlink()
    sequences = text(2, 16, 258)
    assert evaluate(folder, [3], sequences)[0].perplexity == evaluate(made, [3], sequences)[0].perplexity
    with pytest.raises(MissingPlanesError, match="4 bits need planes 0-3"):
        evaluate(folder, [4, 3], sequences)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """Arrays just below glibc's mmap limit came from its heap and were not reused: 0.2 GB more a batch."""
    program = """
import resource, torch
from matquant.evaluate import measure
table = torch.randn(64, 32000)
def peak(batches):
    measure(lambda ids: table[ids].clone(), lambda ids: table[ids].clone(), torch.randint(0, 64, (4 * batches, 256)), [("4", lambda: None)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = peak(2)
print(peak(6) / first)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(run.stdout) < 1.15
