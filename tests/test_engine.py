"""The engine against transformers, against itself at other widths and threads, and drafting against plain decoding."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import FAST, Tiny
from torch import Tensor

import matquant
from matquant.engine import Engine
from matquant.errors import InputError, PlanError, UnservedError
from matquant.pipeline import RunOptions, quantize
from matquant.plan import BitPlan
from matquant.recipe import Recipe
from matquant.speculation import ASK_AGAIN, FIRST_RATE, MOST_DRAFTED, Echo, Narrow, Picker, Rate

SERVED = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]
WIDTHS = (8, 4, 3, 2)
IDS = [(i * 31 + 7) % 250 for i in range(24)]
MIXED = BitPlan(4, {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 8})

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """made("llama") -> a checkpoint of all WIDTHS with refits."""
    folders: dict[str, Path] = {}

    def make(
        kind: str, recipe: Recipe = replace(FAST, parent_bits=8, bits=WIDTHS, targets={8: 1.0}, refit_bits=4, clip_search=False, calibration="self")
    ) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("made") / kind
            quantize(str(tiny(kind)), folders[kind], recipe, RunOptions())
        return folders[kind]

    return make


def of_transformers(folder: Path, bits: int | BitPlan) -> Tensor:
    model = matquant.from_pretrained(folder, bits, keep=8).eval()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("bits", [8, 3, MIXED], ids=str)
def test_logits_are_those_of_transformers(kind: str, bits: int | BitPlan, made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made(kind), bits, keep=8, exact=True)
    want = of_transformers(made(kind), bits)
    torch.testing.assert_close(engine.logits(torch.tensor(IDS)), want, rtol=1e-3, atol=1e-4)
    near = Engine.open(made(kind), bits, keep=8).logits(torch.tensor(IDS))
    assert (near - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("exact", [False, True])
def test_a_token_by_itself_or_among_others_and_any_number_of_threads(exact: bool, made) -> None:  # type: ignore[no-untyped-def]
    folder, ids = made("qwen3"), torch.tensor(IDS)
    whole = Engine.open(folder, 3, exact=exact, threads=1).logits(ids)
    for threads in (2, 5):
        engine = Engine.open(folder, 3, exact=exact, threads=threads)
        assert torch.equal(engine.logits(ids), whole)
        cache, zero = engine.stepper.cache(2, 24), torch.zeros(1, dtype=torch.long)
        one = [engine.step(ids[i : i + 1], zero + 1, zero + i, cache, zero) for i in range(24)]
        assert torch.equal(torch.cat(one), whole)


def test_texts_side_by_side_are_as_if_alone(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 4)
    cache, ids = engine.stepper.cache(3, 8), torch.tensor(IDS[:8])
    order = torch.tensor([2, 0, 2, 0, 2, 0, 2, 0])  # two texts of four tokens, interleaved
    places = torch.arange(8) // 2
    together = engine.step(ids, order, places, cache, torch.arange(8))
    for text, first in ((2, 0), (0, 1)):
        assert torch.equal(together[order == text], engine.logits(ids[first::2]))


def test_any_switches_give_the_logits_of_a_fresh_load(made) -> None:  # type: ignore[no-untyped-def]
    folder, ids = made("llama-tied"), torch.tensor(IDS)
    fresh = {bits: Engine.open(folder, bits).logits(ids) for bits in WIDTHS}
    engine = Engine.open(folder, 8, keep=8)
    arrays = [array.data_ptr() for block in engine.stepper.blocks for weight in block.weights.values() for array in weight.arrays.values()]
    for bits in (2, 8, 3, 3, 4, 2, 8):
        engine.set_bits(bits)
        assert torch.equal(engine.logits(ids), fresh[bits])
    engine.set_bits(MIXED)
    assert torch.equal(engine.logits(ids), Engine.open(folder, MIXED).logits(ids))
    after = [array.data_ptr() for block in engine.stepper.blocks for weight in block.weights.values() for array in weight.arrays.values()]
    assert after == arrays  # not a byte was copied


@pytest.fixture
def only_narrow_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they cost, and nothing from the text itself."""
    monkeypatch.setattr(Echo, "draft", lambda self, most: [])
    monkeypatch.setattr(Narrow, "worth", lambda self: MOST_DRAFTED)


@pytest.mark.usefixtures("only_narrow_drafts")
@pytest.mark.parametrize("draft", [8, 4, 3, 2])
@pytest.mark.parametrize("prompt", [1, 7])
def test_drafting_changes_no_greedy_token(draft: int, prompt: int, made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    for new in (1, 2, 40):
        want = list(engine.generate(IDS[:prompt], new))
        assert len(want) == new and list(engine.generate(IDS[:prompt], new, draft_bits=draft)) == want
    done = engine.speculation
    assert 0 <= done.accepted <= done.drafted and done.passes > 0 and done.made == 43 and not done.copied
    if draft == 8:
        assert done.acceptance == 1.0


def test_a_text_that_repeats_itself_is_copied(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    want = list(engine.generate(IDS[:7], 60))  # a small random model soon goes round
    assert list(engine.generate(IDS[:7], 60, draft_bits=2)) == want
    done = engine.speculation
    assert done.made == 60 and done.copied >= done.stood > 20 and done.per_pass > 1.5


def test_echo_follows_the_last_occurrence() -> None:
    text = [1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9, 1, 2, 3]
    echo = Echo(text)
    assert echo.draft(2) == [5, 6] and echo.draft(9) == [5, 6, 7, 8]  # as many as are believed to stand at first
    text += [4]
    assert echo.draft(9) == [1, 2, 3, 5]
    assert Echo([1, 2, 3]).draft(9) == [] == Echo([1]).draft(9)


def test_a_rate_learns_what_was_tried() -> None:
    rate = Rate()
    rate.learn(0, 0)
    assert rate.value == FIRST_RATE and rate.length == 4
    rate.learn(2, 5)  # two stood, one did not, two were not tried
    assert rate.value == pytest.approx(((FIRST_RATE * 0.9 + 0.1) * 0.9 + 0.1) * 0.9)
    for _ in range(100):
        rate.learn(3, 3)
    assert rate.length == MOST_DRAFTED
    for _ in range(100):
        rate.learn(0, 1)
    assert rate.length == 1


def test_a_read_that_does_not_pay_is_asked_now_and_then(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    narrow = Narrow.of(engine, 2, IDS)
    assert 0 < narrow.cost < Narrow.of(engine, 4, IDS).cost < 1
    assert narrow.worth() == MOST_DRAFTED
    narrow.rate.value = 0.0
    assert [narrow.worth() for _ in range(2 * ASK_AGAIN)] == [*[0] * (ASK_AGAIN - 1), 1] * 2
    words = engine.stepper.geometry.vocabulary
    assert Narrow.of(engine, 2, [words - 1]).words == words > Narrow.of(engine, 2, [0] * 30).words  # a text of rare words


def test_logits_of_the_first_words_are_those_of_all(made) -> None:  # type: ignore[no-untyped-def]
    session = Engine.open(made("llama"), 4).session()
    whole = session.read(IDS, 0, last=3)
    assert torch.equal(session.read(IDS, 0, last=3, words=37), whole[:, :37])


def test_generation_is_the_argmax_of_whole_texts(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 4)
    text = list(IDS[:5])
    for token in engine.generate(text[:5], 12):
        assert token == int(engine.logits(torch.tensor(text))[-1].argmax())
        text.append(token)
    end = text.index(text[8], 5)
    assert list(engine.generate(IDS[:5], 12, stop=[text[8]])) == text[5 : end + 1]


def test_draws_follow_the_distribution_over_many_blocks() -> None:
    """40,000 draws of 700 words, many of which are impossible: within five standard deviations of every count."""
    g = torch.Generator().manual_seed(1)
    pick, p = Picker(1.0, g), torch.rand(700, generator=g) ** 8
    p[torch.rand(700, generator=g) < 0.5] = 0
    p[300:600] = 0  # a whole block
    p /= p.sum()
    rounds = 40_000
    counts = torch.bincount(torch.tensor([pick.draw(p) for _ in range(rounds)]), minlength=700)
    assert ((counts - rounds * p).abs() <= 5 * (rounds * p * (1 - p)).sqrt() + 1e-6).all()  # none where p is 0


@pytest.mark.parametrize("belief", ["all words", "the first words", "certain"])
def test_drafted_samples_have_the_verifiers_distribution(belief: str) -> None:
    """Frequencies of 40,000 tokens against p, whatever the draft believed: within five standard deviations of every count."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=g) * 1.5
    pick = Picker(0.8, g)
    p, q = pick.probabilities(logits[0]), pick.probabilities(logits[1])
    if belief == "the first words":
        q = q[:3] / q[:3].sum()
    rounds, counts = 40_000, torch.zeros(6)
    for _ in range(rounds):
        token = 1 if belief == "certain" else pick.draw(q)
        accepted, following = pick.verify([token], [None if belief == "certain" else q], logits[[0, 2]])
        counts[token if accepted else following] += 1
    assert ((counts - rounds * p).abs() < 5 * (rounds * p * (1 - p)).sqrt()).all()
    q = torch.nn.functional.pad(q, (0, 6 - len(q)))
    assert ((counts - rounds * q).abs() > 5 * (rounds * q * (1 - q)).sqrt()).any()  # the test tells p from q


def test_a_session_passes_only_what_is_new(made, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    passed: list[int] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, ids, *rest: passed.append(len(ids)) or step(self, ids, *rest))
    session = engine.session()
    first = list(session.reply(IDS[:6], 5))
    assert passed == [6, 1, 1, 1, 1] and session.ids == IDS[:6] + first
    passed.clear()
    second = list(session.reply(IDS[6:9], 3))
    assert passed == [4, 1, 1]  # the last token of the reply, and three new ones
    assert second == list(engine.generate([*IDS[:6], *first, *IDS[6:9]], 3))
    passed.clear()
    assert session.rewind([*IDS[:6], *first[:2], 9, 9]) == [9, 9] and session.ids == [*IDS[:6], *first[:2]]
    assert list(session.reply([9, 9], 2)) == list(engine.generate([*IDS[:6], *first[:2], 9, 9], 2))
    assert passed[:2] == [2, 1]
    assert session.rewind(session.ids) == [] and list(session.reply([], 1))  # a whole text may simply go on


@pytest.mark.parametrize("draft", [None, 4, 2])
@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_a_reply_may_be_left_at_any_token(draft: int | None, after: int, made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    session, whole = engine.session(64), list(engine.generate(IDS[:4], 20))
    reply = session.reply(IDS[:4], 20, draft_bits=draft)
    assert [next(reply) for _ in range(after)] == whole[:after]
    reply.close()
    assert session.ids == IDS[:4] + whole[:after]
    assert list(session.reply([], 20 - after, draft_bits=draft)) == whole[after:]
    with pytest.raises(InputError, match="24 tokens and 41 new ones are more than the 64 there is room for"):
        next(session.reply([], 41))


def test_tokens_that_end_a_text(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert Engine.open(made("llama"), 8).stop == (257,)
    shutil.copytree(made("llama"), tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": [5, 257]}')
    assert Engine.open(tmp_path / "other", 8).stop == (5, 257)


def test_bytes_that_a_token_reads(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    weights = sum(shape.weights for shape in engine.checkpoint.modules.values())
    for wide, narrow in ((8, 4), (4, 3), (3, 2)):
        codes = weights * (wide - narrow) / 8
        assert engine.read_bytes(wide) - engine.read_bytes(narrow) == pytest.approx(codes, rel=0.15)  # refits are bytes too
    assert engine.read_bytes(MIXED) > engine.read_bytes(2)


def test_sampling_repeats_with_its_seed(made) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 8, keep=8)
    one, two, other = (list(engine.generate(IDS[:4], 20, 1.0, seed, draft_bits=2)) for seed in (1, 1, 2))
    assert one == two != other


def test_refusals(made, tiny: Tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine = Engine.open(made("llama"), 4)
    with pytest.raises(PlanError, match="8 bits were not kept of model.layers.0.self_attn.q_proj; choose from 4.*or open the checkpoint with keep=8"):
        engine.set_bits(8)
    with pytest.raises(InputError, match="the prompt has no tokens; give at least one"):
        next(engine.generate([], 3))
    with pytest.raises(InputError, match="4 tokens and 200 new ones are more than the 128 there is room for; ask for fewer"):
        next(engine.generate(IDS[:4], 200))
    for kind, words in (
        ("gpt2", "GPT2LMHeadModel has other parts; use matquant.from_pretrained"),
        ("gemma2", "the engine computes Gemma2ForCausalLM wrongly"),
    ):
        quantize(str(tiny(kind)), tmp_path / kind, replace(FAST, parent_bits=4, bits=(4,), targets={4: 1.0}), RunOptions())
        with pytest.raises(UnservedError, match=words):
            Engine.open(tmp_path / kind)
    rounds = replace(FAST, parent_bits=4, bits=(4,), targets={4: 1.0}, slicing="round")
    quantize(str(tiny("llama")), tmp_path / "round", rounds, RunOptions())
    with pytest.raises(UnservedError, match="the engine reads slicing floor, not round; use matquant.from_pretrained"):
        Engine.open(tmp_path / "round")
