"""Other packages on the shape that serving.py measures, each in a process of its own, so that all are loaded once and take turns.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install torch==2.13.0 transformers==5.5.4 torchao==0.17.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0
        openvino==2026.4.1 nncf==3.4.0 optimum-intel==2.2.0 accelerate
    PEERS/bin/pip uninstall torchvision     # optimum-intel brings the one for CUDA's torch, which keeps transformers from loading; nothing needs it
    PEERS/bin/python serving_peers.py NAME DENSE WORK THREADS      # as serving.py starts it: a name in PACKAGES, an ordinary Llama folder

One environment does for all: optimum-intel 2.2 wants transformers below 5.6, onnxruntime-genai's builder one that has Qwen 3.5, and torchao's 4-bit
product for CPUs went with 0.18. The two engines that read files of their own find them in WORK, or make them there.

Each process says what it is in one line of JSON when its model is loaded, then answers every line {"prompt": [tokens], "new": count} with
{"decode": tokens a second, "prefill": ...}, timed as serving.py times ours: from the prompt to the first token, and behind one token to the last.
All decode greedily one text, compute the head for the last position of a prompt only, and keep to the packages' own defaults but for what is said here.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

GROUP = 64  # weights a scale, as in ours, where the package does not choose itself; it divides SmolLM2's 576 inputs
BLOCK = 32  # of ONNX Runtime: its builder's default
LEVEL = 4  # of ONNX Runtime's products: 8-bit inputs, the fastest

Generate = Callable[[list[int], int], Iterator[int]]  # (prompt, new tokens) -> the tokens, each as soon as it is known


@dataclass(frozen=True)
class Package:
    """words: in tables. distributions: whose versions are told. build: (dense folder, folder for files, bits, threads) -> how to generate."""

    words: str
    bits: int
    distributions: tuple[str, ...]
    build: Callable[[Path, Path, int, int], Generate]


# --- transformers and torch -----------------------------------------------------------------------------------------


def torch_plain(dense: Path, work: Path, bits: int, threads: int) -> Generate:
    return _greedy(_loaded(dense, bits, threads))


def torchao(dense: Path, work: Path, bits: int, threads: int) -> Generate:
    """Weights only, the head's too; 8 bits a row, 4 bits in groups, in the layout that torch's product for CPUs takes."""
    from torchao.prototype.quantization.int4 import Int4WeightOnlyOpaqueTensorConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _loaded(dense, 16, threads)
    quantize_(model, Int8WeightOnlyConfig(version=2) if bits == 8 else Int4WeightOnlyOpaqueTensorConfig(group_size=GROUP))
    return _greedy(model)


def _loaded(dense: Path, bits: int, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(dense, dtype={32: torch.float32, 16: torch.bfloat16}[bits]).eval()


def _greedy(model: Any) -> Generate:
    """A bare loop around the model: `model.generate` does more between two tokens.

    Compiled for the two lengths that are asked for, one token and the prompt, which takes two minutes (18 s when WORK has it already). On SmolLM2's shape
    that decodes 1.25 times as fast in bfloat16, 1.4 times with 4-bit weights and 4 times with 8-bit ones, which are else widened before every product.
    """
    import torch
    from transformers import StaticCache

    step = torch.compile(model, dynamic=False)

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> Iterator[int]:
        cache = StaticCache(config=model.config, max_cache_len=len(prompt) + new)
        ids, places = torch.tensor([prompt]), torch.arange(len(prompt) + new)
        for end in range(len(prompt), len(prompt) + new):
            now = places[end - ids.shape[1] : end]
            ids = step(input_ids=ids, past_key_values=cache, cache_position=now, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            yield int(ids)

    return generate


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def onnxruntime(dense: Path, work: Path, bits: int, threads: int) -> Generate:
    """MatMulNBits and GroupQueryAttention through onnxruntime-genai, which chooses the token and keeps the cache."""
    import onnxruntime_genai as genai

    folder = _made(work / f"{dense.name}-onnx-{bits}", _make_onnx, dense, bits)
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def generate(prompt: list[int], new: int) -> Iterator[int]:
        parameters, room = genai.GeneratorParams(model), len(prompt) + new
        parameters.set_search_options(max_length=room, min_length=room, do_sample=False)  # an end of text does not end it
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return generate


def _make_onnx(folder: Path, dense: Path, bits: int) -> None:
    from onnxruntime_genai.models import builder

    where = ("", str(dense), str(folder), f"int{bits}", "cpu", str(folder / "cache"))
    options = [f"block_size={BLOCK}", f"accuracy_level={LEVEL}", "prune_lm_head=true"]
    builder.create_model(*where, **builder.parse_extra_options(*where, options))


# --- OpenVINO -------------------------------------------------------------------------------------------------------


def openvino(dense: Path, work: Path, bits: int, threads: int) -> Generate:
    """optimum-intel's graph, whose cache is in the request's state, with NNCF's weights."""
    import numpy as np
    from openvino import Core

    folder = _made(work / f"{dense.name}-openvino-{bits}", _make_openvino, dense, bits)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()

    def generate(prompt: list[int], new: int) -> Iterator[int]:
        request.reset_state()
        ids, end = np.array([prompt]), 0
        for _ in range(new):
            start, end = end, end + ids.shape[1]
            inputs = {"input_ids": ids, "attention_mask": np.ones((1, end), np.int64), "position_ids": np.arange(start, end)[None]}
            logits = request.infer(inputs | {"beam_idx": np.zeros(1, np.int32)}, share_outputs=True)["logits"]
            ids = logits[:, -1:].argmax(-1)
            yield int(ids[0, 0])

    return generate


def _make_openvino(folder: Path, dense: Path, bits: int) -> None:
    """8 bits: a scale and a zero a row, the default. 4 bits: symmetric, in groups, head and embeddings too (by default they keep 8)."""
    import nncf
    from openvino import Core, save_model
    from optimum.exporters.openvino import main_export

    whole = folder / "whole"
    main_export(str(dense), whole, task="text-generation-with-past", convert_tokenizer=False)
    four = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP, "ratio": 1.0, "all_layers": True}
    model = nncf.compress_weights(Core().read_model(whole / "openvino_model.xml"), **(four if bits == 4 else {}))
    _head_of_the_last(model)
    save_model(model, folder / "openvino_model.xml")
    shutil.rmtree(whole)


def _head_of_the_last(model: Any) -> None:
    """The head's product for the last position alone, as openvino-genai has it."""
    from openvino import opset13

    (result,) = model.get_results()
    product = result.input_value(0).get_node().input(0)
    bounds = ([-1], [2**31 - 1], [1], [1])  # start, stop, step, axis
    product.replace_source_output(opset13.slice(product.get_source_output(), *bounds).output(0))
    model.validate_nodes_and_infer_types()


# --- the process ----------------------------------------------------------------------------------------------------

PACKAGES = {
    "torch-32": Package("transformers, torch.compile, float32", 32, ("transformers", "torch"), torch_plain),
    "torch-16": Package("transformers, torch.compile, bfloat16", 16, ("transformers", "torch"), torch_plain),
    "torchao-8": Package("torchao int8 weights, torch.compile", 8, ("transformers", "torchao"), torchao),
    "torchao-4": Package("torchao int4 weights, torch.compile", 4, ("transformers", "torchao"), torchao),
    "onnxruntime-8": Package("ONNX Runtime MatMulNBits", 8, ("onnxruntime", "onnxruntime-genai"), onnxruntime),
    "onnxruntime-4": Package("ONNX Runtime MatMulNBits", 4, ("onnxruntime", "onnxruntime-genai"), onnxruntime),
    "openvino-8": Package("OpenVINO int8 weights", 8, ("openvino", "nncf"), openvino),
    "openvino-4": Package("OpenVINO int4 weights", 4, ("openvino", "nncf"), openvino),
}


def _made(folder: Path, make: Callable[..., None], *arguments: Any) -> Path:
    """The folder, made if it is not there; by a process that ends, for converters leave gigabytes behind them."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        process = multiprocessing.get_context("spawn").Process(target=make, args=(unfinished, *arguments))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{make.__name__} failed")
        unfinished.rename(folder)
    return folder


def times(generate: Generate, prompt: list[int], new: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    started = time.perf_counter()
    tokens = generate(prompt, new)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - started, time.perf_counter() - first


def main() -> None:
    name, dense, work, threads = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": str(Path(work) / "inductor")}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # packages print
    package = PACKAGES[name]
    generate = package.build(Path(dense), Path(work), package.bits, int(threads))
    print(json.dumps({"versions": {of: version(of) for of in package.distributions}}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = generate(asked["prompt"][:1], asked["new"])
        _ = next(tokens), next(tokens)  # until here the processor's caches held another's weights
        prefill = len(asked["prompt"]) / times(generate, asked["prompt"], 1)[0]
        decode = (asked["new"] - 1) / times(generate, asked["prompt"][:1], asked["new"])[1]
        print(json.dumps({"decode": decode, "prefill": prefill}), file=answers)


if __name__ == "__main__":
    main()
