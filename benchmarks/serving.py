"""The engine against llama.cpp on one model's shape: tokens a second of decoding and of prefill, in alternation, at every width.

    python benchmarks/serving.py CHECKPOINT --name WORDS --out results.json --llama-bench PROGRAM --built WORDS
        --peer 8:MODEL-Q8_0.gguf --peer 4:MODEL-Q4_0.gguf ... [--bits 8 6 4 3 2] [--draft-bits ...]
        [--head-bits 4 2] [--prompt-tokens 512] [--new-tokens 24] [--rounds 5] [--threads 2]

llama.cpp is the source in PyPI's llama-cpp-python, built for the machine it runs on (GGML_NATIVE); files of random weights of the same shape come from
random_gguf.py and llama-quantize, the checkpoint from random_checkpoint.py. In each round every contender runs once, and a probe of read bandwidth
before and after. A head at 8 bits is our default; llama.cpp's is as narrow as the layers, so --head-bits N adds ours with layers and head at N bits.
Numbers are medians over rounds, with the best beside them. A decode step of ours goes from embedding to the chosen token; llama-bench
leaves out the choice of a token.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from peers import command
from quality import machine

from matquant.benchmark import bandwidth, prompt_of, times_of
from matquant.engine import Engine, Speculation


def of_engine(engine: Engine, bits: int, prompt: list[int], new: int, draft: int | None = None) -> dict[str, float]:
    """Tokens a second; of decoding behind a short prompt, as llama-bench measures it."""
    engine.set_bits(bits)
    rates = {"decode": (new - 1) / times_of(engine, prompt[:1], new, draft)[1]}
    return rates if draft else rates | {"prefill": len(prompt) / times_of(engine, prompt, 1)[0]}


def of_llama_bench(program: Path, file: Path, prompt: int, new: int, threads: int) -> dict[str, float]:
    arguments = [str(program), "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", "-p", str(prompt), "-n", str(new)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(program.parent)}
    found = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment).stdout)
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in found}


def keep(runs: dict[str, Any], key: str, about: dict[str, Any], rates: dict[str, float]) -> None:
    run = runs.setdefault(key, about | {"rates": {}})
    for name, rate in rates.items():
        run["rates"].setdefault(name, []).append(round(rate, 2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--built", required=True, help="how llama.cpp was built")
    parser.add_argument("--peer", action="append", default=[], metavar="BITS:FILE", help="a GGUF file and the width it is compared with")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 4, 3, 2])
    parser.add_argument("--draft-bits", type=int, nargs="*", default=[])
    parser.add_argument("--head-bits", type=int, nargs="*", default=[])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    engine = Engine.open(options.checkpoint, max(options.bits), max(options.bits), threads=options.threads)
    narrow = {bits: Engine.open(options.checkpoint, bits, head_bits=bits, threads=options.threads) for bits in options.head_bits}
    prompt = prompt_of(engine, options.prompt_tokens)
    runs: dict[str, Any] = {}
    probes: list[float] = []
    for done in range(options.rounds):
        probes.append(round(bandwidth(options.threads), 1))
        for bits in options.bits:
            about = {"bits": bits, "words": "matquant", "read_bytes": engine.read_bytes(bits)}
            keep(runs, f"matquant-{bits}", about, of_engine(engine, bits, prompt, options.new_tokens))
        for bits, other in narrow.items():
            about = {"bits": bits, "words": f"matquant, head at {bits} bits", "read_bytes": other.read_bytes(bits)}
            keep(runs, f"matquant-{bits}-head", about, of_engine(other, bits, prompt, options.new_tokens))
        for draft in options.draft_bits:
            widest = max(options.bits)
            engine.speculation = Speculation()
            rates = of_engine(engine, widest, prompt, options.new_tokens, draft) | {"acceptance": engine.speculation.acceptance}
            keep(runs, f"matquant-{widest}-by-{draft}", {"bits": widest, "words": f"matquant, drafted at {draft} bits"}, rates)
        for peer in options.peer:
            bits, _, file = peer.partition(":")
            kind = Path(file).stem.rpartition("-")[2]
            rates = of_llama_bench(options.llama_bench, Path(file), options.prompt_tokens, options.new_tokens, options.threads)
            keep(runs, f"llama.cpp-{kind}", {"bits": int(bits), "words": f"llama.cpp {kind}", "read_bytes": Path(file).stat().st_size}, rates)
        probes.append(round(bandwidth(options.threads), 1))
        print(done, {key: {name: rates[-1] for name, rates in run["rates"].items()} for key, run in runs.items()}, probes[-2:], flush=True)
    for run in runs.values():
        run |= {
            "median": {name: median(rates) for name, rates in run["rates"].items()},
            "best": {name: max(rates) for name, rates in run["rates"].items()},
        }
    setting = {name: getattr(options, name) for name in ("name", "prompt_tokens", "new_tokens", "rounds", "threads")}
    about = machine() | {"isa": engine.stepper.head.isa, "processor": processor(), "llama.cpp": options.built}
    result = {"setting": setting, "command": command(), "machine": about, "probe_gb_s": probes, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
