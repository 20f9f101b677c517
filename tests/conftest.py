"""Shared fixtures: a byte-level tokenizer and tiny random models of many architectures, built on the spot.

Real small models and texts live outside the repository; MATQUANT_DATA (default ../shared/data) says where. Tests that need
them take the `data` fixture and are skipped, with the reason, where the folder is missing.
"""

import gc
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MATQUANT_DATA", REPO.parent / "shared" / "data"))
sys.meta_path.sort(key=lambda finder: type(finder).__name__ != "SlipcoverMetaPathFinder")  # it wraps what jaxtyping's hook loads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # counts only before Triton is imported


@pytest.fixture(scope="session")
def quick_collect() -> Iterator[None]:
    """Spare gc.collect(), which is called after every block, the 300000 objects that live as long as the imports do."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real models and texts; skips where it is not at hand."""
    if not DATA.is_dir():
        pytest.skip(f"needs real models and texts in {DATA} (set MATQUANT_DATA)")
    return DATA


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """load_script("benchmarks/padded.py") -> that file, which no package holds, as a module; it finds what lies beside it."""

    def load(path: str) -> ModuleType:
        file = REPO / path
        spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(file.parent))
            patch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up there, while they are made
            spec.loader.exec_module(module)
        return module

    return load


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes and <s>, </s> (ids 256, 257), saved as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": 256, "</s>": 257}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


SMALL = dict(vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=257)  # fmt: skip
ARCHITECTURES = {
    "llama": ("LlamaConfig", SMALL),
    "llama-tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 32}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 16, "sliding_window": 32}),
    "gemma3": ("Gemma3TextConfig", SMALL | {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", SMALL),
    "opt": ("OPTConfig", dict(vocab_size=258, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
                              max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=257)),
    "gpt2": ("GPT2Config", dict(vocab_size=258, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=128, bos_token_id=256, eos_token_id=257, pad_token_id=257)),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny("llama") -> folder of a saved 2-layer random model with tokenizer (hidden 64, intermediate 96, vocabulary 258)."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            import transformers

            config_class, arguments = ARCHITECTURES[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            save_byte_tokenizer(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 9000 bytes, that is, tokens of the byte tokenizer."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and {i} cubed {i**3}.\n" for i in range(250)))
    return path


@pytest.fixture
def edited(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """edited("llama", {"vocab_size": 9}, change) -> a copy whose config.json has these values; `change` alters its tensors in place."""

    def make(name: str, config: dict[str, Any] | None = None, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / f"edited-{name}"
        shutil.copytree(tiny(name), folder)
        if config:
            (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


# --- whole runs (runs.py) ---
# matquant is imported within: a conftest is read before pytest has its shape checker look at imports.


@pytest.fixture
def no_plots(request: pytest.FixtureRequest, quick_collect: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than all the rest of a run of a tiny model; the tests that ask for them have `plot` in their names."""
    from matquant import pipeline

    if "plot" not in request.node.name:
        monkeypatch.setattr(pipeline, "quality_svg", lambda rows: None)
        monkeypatch.setattr(pipeline, "errors_svg", lambda layers, outputs: None)


@pytest.fixture
def recipe(text: Path) -> Any:
    from runs import SMALL

    return replace(SMALL, calibration=str(text))


@pytest.fixture(scope="session")
def want(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `recipe` makes of "llama" when nothing disturbs it."""
    from runs import SMALL

    from matquant import pipeline

    folder = tmp_path_factory.mktemp("want") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quality_svg", lambda rows: None)
        patch.setattr(pipeline, "errors_svg", lambda layers, outputs: None)
        pipeline.quantize(str(tiny("llama")), folder, replace(SMALL, calibration=str(text)), pipeline.RunOptions())
    return folder


# --- plans ---


@pytest.fixture(scope="session")
def rounded(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """rounded("llama") -> a checkpoint of it at 8 to 2 bits, rounded to nearest; never write into the folder."""
    from building import build_checkpoint

    from matquant.recipe import Recipe

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("rounded") / name
            build_checkpoint(tiny(name), made[name], Recipe(method="minmax", group_size=32))
        return made[name]

    return make


@pytest.fixture
def own(rounded: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of rounded("llama") to write into."""
    return Path(shutil.copytree(rounded("llama"), tmp_path / "own"))
