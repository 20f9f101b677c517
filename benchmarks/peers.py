"""AutoRound and GPTQModel at single widths, on the tokens that quality.py takes, read by our own evaluation.

    OURS/python  benchmarks/peers.py windows MODEL --work DIR --calibration FILE|self --text FILE|self [--text FILE ...]
                                                   [--num-samples 32] [--eval-samples 16] [--seq-len 512] [--seed 0]
    PEERS/python benchmarks/peers.py make    MODEL --work DIR --group-size 64 [--bits 4 3 2] [--only NAME ...]
    OURS/python  benchmarks/peers.py measure MODEL --work DIR --group-size 64 --name WORDS --out results.json

Two environments, because the packages pin what they depend on; PEERS needs nothing of ours and OURS nothing of theirs:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 && PEERS/bin/pip install torch==2.13.0 auto-round==0.16.1 gptqmodel==7.6.0

Each package runs with its own defaults, but for the group size and the calibration sequences; what else differs is in VARIANTS and in
the two functions that call them. It writes its own packed checkpoint, which is unpacked here, w = s (q - z), into an ordinary float32
checkpoint: every tensor that it did not quantize is the original's, so that only its integers and scales are compared.
Bits per weight count what lies in its file, packed zeros included, though a symmetric grid's zeros are all the same.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WINDOWS = "windows.safetensors"
TRAIN = "train"
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in its word each of eight outputs lies


@dataclass(frozen=True)
class Variant:
    """settings: arguments of the package that are not its defaults."""

    package: str
    words: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


# Both packages are symmetric by default. GPTQModel's default format stores zeros less one, where a zero of 0 borrows from its neighbour;
# gptq_v2 stores them as they are.
VARIANTS = {
    "gptqmodel": Variant("gptqmodel", "GPTQModel"),
    "autoround": Variant("auto-round", "AutoRound"),
    "gptqmodel-asymmetric": Variant("gptqmodel", "GPTQModel, asymmetric", {"sym": False, "format": "gptq_v2"}),
    "autoround-asymmetric": Variant("auto-round", "AutoRound, asymmetric", {"sym": False}),
}


# --- windows: in our environment ------------------------------------------------------------------------------------------


def take_windows(options: argparse.Namespace) -> None:
    """DIR/windows.safetensors: the sequences that quality.py takes for the same arguments, TRAIN and one tensor a text."""
    from quality import calibrating, evaluation  # it needs matquant, which `make` must do without

    from matquant import models

    source = models.open_source(options.model)
    tokenizer = source.tokenizer()
    dense = models.load_dense(options.model, source.folder, None, dtype=torch.float32)
    found = {TRAIN: calibrating(options.calibration, tokenizer, dense, options.num_samples, options.seq_len, options.seed)}
    for text in options.text or ["self"]:
        found[Path(text).name] = evaluation(text, tokenizer, dense, options.eval_samples, options.seq_len)
    facts = {"calibration": Path(options.calibration).name, "seed": str(options.seed)}
    options.work.mkdir(parents=True, exist_ok=True)
    save_file({name: ids.contiguous() for name, ids in found.items()}, options.work / WINDOWS, facts)


# --- make: in theirs ------------------------------------------------------------------------------------------------------


def gptqmodel(model: str, train: torch.Tensor, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize in float32, as we do (its default on a CPU is bfloat16), and save. Returns what was set."""
    # Of two cores it gives one worker to "cpu" and then asks for two to load with, a ValueError.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    peer = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu", dtype=torch.float32)
    peer.quantize([ids.tolist() for ids in train])
    peer.save(str(out))
    return {**settings, "dtype": "float32"}


def autoround(model: str, train: torch.Tensor, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize, in bfloat16 where the CPU has it, and save. Returns what was set.

    It drops sequences shorter than `seqlen` and stops after `nsamples`: both are those of `train`.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count, length = train.shape
    settings = {**settings, "nsamples": count, "seqlen": length}
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    peer = AutoRound(dense, tokenizer, dataset=list(train.split(1)), device_map="cpu", **settings)
    peer.quantize_and_save(str(out), format="auto_round")
    return settings


def make(options: argparse.Namespace) -> None:
    """DIR/VARIANT-BITS: a float32 checkpoint and facts.json, written last; those that have it are left alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    train = load_file(options.work / WINDOWS)[TRAIN]
    for name in options.only:
        variant = VARIANTS[name]
        quantize, extra = (autoround, options.autoround) if variant.package == "auto-round" else (gptqmodel, {})
        for bits in options.bits:
            folder = options.work / f"{name}-{bits}"
            if (folder / "facts.json").exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            started = time.perf_counter()
            own = quantize(options.model, train, folder / "packed", {"bits": bits, "group_size": options.group_size, **variant.settings, **extra})
            seconds = round(time.perf_counter() - started, 1)
            counted = unpack_checkpoint(Path(options.model), next((folder / "packed").rglob("*.safetensors")).parent, folder)
            shutil.rmtree(folder / "packed")
            versions = {package: version(package) for package in (variant.package, "torch", "transformers")}
            settings = {key: value for key, value in own.items() if key not in ("bits", "group_size")}
            facts = {"bits": bits, "command": command(), "settings": settings, "versions": versions, "quantize_seconds": seconds, **counted}
            (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
            print(name, bits, seconds, flush=True)


def command() -> str:
    """This one, without folders."""
    return " ".join(Path(a).name if "/" in a else a for a in sys.argv)


def unpack_checkpoint(model: Path, packed: Path, out: Path) -> dict[str, Any]:
    """Write `model` with the linear layers that `packed` holds. Returns their names and bits per weight as they are stored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    stored = {}
    for file in packed.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - not a dict
    layers = sorted(key.removesuffix(".qweight") for key in stored if key.endswith(".qweight"))
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    bits = weights = order = 0
    for name in layers:
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{part}" in stored}
        read = dequantize(parts, config)
        linear = dense.get_submodule(name)
        assert read.shape == linear.weight.shape, (name, read.shape)
        linear.weight = torch.nn.Parameter(read, requires_grad=False)
        size = {part: 8 * tensor.nbytes for part, tensor in parts.items()}
        weights, order = weights + read.numel(), order + size.pop("g_idx", 0)
        bits += sum(size.values())
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    # g_idx names each input's group; without reordering it says nothing, and readers do without it.
    return {"layers": layers, "bits_per_weight": bits / weights, "bits_per_weight_with_g_idx": (bits + order) / weights}


def dequantize(parts: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """w = s (q - z), [out, in] float32. scales: [groups, out]; g_idx, where there is one: the group of every input."""
    codes, zeros = integers(parts, config)
    group = parts.get("g_idx", torch.arange(len(codes)) // config["group_size"]).long()
    return (parts["scales"].float()[group] * (codes - zeros[group])).T.contiguous()


def integers(parts: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [in, out] and zeros [groups, out].

    GPTQ packs codes along the inputs and zeros along the outputs; its first version stores zeros less one, its second and AutoRound's
    own do not. AWQ packs both along the outputs, eight to a word in its own order; AutoRound takes it for asymmetric 4-bit grids.
    """
    bits, packing = config["bits"], config.get("packing_format") or config["checkpoint_format"]
    if packing.endswith("awq"):
        assert bits == 4, bits
        codes, zeros = (unpack(parts[part].T, bits).unflatten(0, (-1, 8))[:, AWQ_ORDER].flatten(0, 1).T for part in ("qweight", "qzeros"))
        return codes, zeros
    less = int(packing.endswith("gptq"))
    return unpack(parts["qweight"], bits), (unpack(parts["qzeros"].T, bits).T + less) % 2**bits


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, columns] -> integers [32 n / bits, columns]: each column is one stream of bits, the lowest of the first word first."""
    stream = ((words[:, None] >> torch.arange(32, dtype=torch.int32)[:, None]) & 1).flatten(0, 1)
    places = 2 ** torch.arange(bits, dtype=torch.int32)[:, None]
    return (stream.unflatten(0, (-1, bits)) * places).sum(1)


# --- measure: in our environment ------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> None:
    """Add to the results, in quality.py's form, every checkpoint of DIR that is not among them."""
    from quality import machine

    from matquant import models
    from matquant.recipe import Recipe

    source = models.open_source(options.model)
    wanted = sorted(models.find_layers(source.model, Recipe(group_size=options.group_size)).quantized)
    dense = models.load_dense(options.model, source.folder, None, dtype=torch.float32)
    texts = load_file(options.work / WINDOWS)
    train = texts.pop(TRAIN)
    with safe_open(options.work / WINDOWS, "pt") as file:
        taken = file.metadata()
    setting = {"group_size": options.group_size, "train": list(train.shape), "calibration": taken["calibration"]}
    setting["held_out"] = list(next(iter(texts.values())).shape)
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    if result.get("setting", setting) != setting:
        sys.exit(f"{options.out} was made with other settings: {result['setting']}; choose another --out")
    result = {"name": options.name, "setting": setting, "original": {}} | result
    for path in sorted(options.work.glob("*-[0-9]/facts.json"), reverse=True):
        facts = json.loads(path.read_text())
        name = path.parent.name.rpartition("-")[0]
        run = result["runs"].setdefault(f"{name}/{taken['seed']}", {"words": VARIANTS[name].words, "rows": []})
        if facts["bits"] in {row["bits"] for row in run["rows"]}:
            continue
        if facts["layers"] != wanted:
            sys.exit(f"{path.parent} quantizes other layers than ours")
        run |= {key: facts[key] for key in ("command", "settings", "versions")} | {"machine": machine()}
        peer = models.load_dense(str(path.parent), path.parent, None, dtype=torch.float32)
        shown = {key: facts[key] for key in ("bits", "bits_per_weight", "bits_per_weight_with_g_idx", "quantize_seconds")}
        for text, ids in texts.items():
            result["original"][text], found = quality_of(peer, dense, ids)
            run["rows"].append({"text": text, "refit": False, **shown, **found})
            print(name, run["rows"][-1], flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def quality_of(peer: Any, dense: Any, ids: torch.Tensor) -> tuple[float, dict[str, float | None]]:
    """Perplexity of the original, and what a row says of the peer."""
    from matquant.evaluate import logits_of, measure

    original, found = measure(logits_of(peer), logits_of(dense), ids, [("peer", lambda: None)])
    return original.perplexity, {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = parser.add_subparsers(required=True)
    for stage, run in (("windows", take_windows), ("make", make), ("measure", measure_all)):
        sub = stages.add_parser(stage)
        sub.set_defaults(run=run)
        sub.add_argument("model", help="a folder")
        sub.add_argument("--work", type=Path, required=True, help="folder that the stages share")
        if stage == "windows":
            sub.add_argument("--calibration", default="self")
            sub.add_argument("--text", action="append", help="may be given again")
            sub.add_argument("--num-samples", type=int, default=32)
            sub.add_argument("--eval-samples", type=int, default=16)
            sub.add_argument("--seq-len", type=int, default=512)
            sub.add_argument("--seed", type=int, default=0)
            continue
        sub.add_argument("--group-size", type=int, default=64)
        if stage == "make":
            sub.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[2, 3, 4, 8])
            sub.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
            sub.add_argument("--autoround", type=json.loads, default={}, help='more of its arguments, as JSON: {"batch_size": 2}')
        else:
            sub.add_argument("--name", required=True, help="of the model, in tables")
            sub.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
