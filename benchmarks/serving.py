"""The engine against llama.cpp and other packages on one model's shape: tokens a second of decoding and of prefill, in alternation, at every width.

    python benchmarks/serving.py CHECKPOINT --name WORDS --out results.json --llama-bench PROGRAM --built WORDS
        --peer 8:MODEL-Q8_0.gguf --peer 4:MODEL-Q4_0.gguf ... [--bits 8 6 4 3 2] [--draft-bits ...]
        [--head-bits 4 2] [--prompt-tokens 512] [--new-tokens 24] [--rounds 5] [--threads 2]
        [--dense FOLDER --work FOLDER --peer-python PEERS/bin/python [--packages torch-16 openvino-4 ...]]

llama.cpp is the source in PyPI's llama-cpp-python, built for the machine it runs on (GGML_NATIVE); files of random weights of the same shape come from
random_gguf.py and llama-quantize, the checkpoint from random_checkpoint.py. In each round every contender runs once, and a probe of read bandwidth
before and after. A head at 8 bits is our default; llama.cpp's is as narrow as the layers, so --head-bits N adds ours with layers and head at N bits.
Numbers are medians over rounds, with the best beside them. A decode step of ours goes from embedding to the chosen token; llama-bench
leaves out the choice of a token.

The packages are those of serving_peers.py, which says how to make their environment; random_checkpoint.py --dense makes the folder they start from.
Those that do not start are named with the reason, in the results too. The whole table, for two shapes (B: llama.cpp's binaries, G: its files):

    python random_checkpoint.py tiny; python random_checkpoint.py tiny-dense --dense
    python random_checkpoint.py smolr --shape smollm2-135m --tied; python random_checkpoint.py smolr-dense --shape smollm2-135m --tied --dense
    python serving.py tiny --name "1.1B, TinyLlama's shape" --out serving-tiny.json --llama-bench B/llama-bench --built WORDS
        --peer 8:G/tiny-Q8_0.gguf --peer 6:G/tiny-Q6_K.gguf --peer 4:G/tiny-Q4_0.gguf --peer 3:G/tiny-Q3_K.gguf --peer 2:G/tiny-Q2_K.gguf
        --peer 2:G/tiny-TQ2_0.gguf --prompt-tokens 256 --rounds 3 --head-bits 4 2 --dense tiny-dense --work WORK --peer-python PEERS/bin/python
    python serving.py smolr --name "SmolLM2-135M's shape" --out serving-smol.json --llama-bench B/llama-bench --built WORDS
        --peer 8:G/smol-Q8_0.gguf --peer 4:G/smol-Q4_0.gguf --peer 2:G/smol-Q2_K.gguf --prompt-tokens 512 --new-tokens 64 --rounds 5 --head-bits 4 2
        --dense smolr-dense --work WORK --peer-python PEERS/bin/python

All models stay in memory: 16 GB for 1.1B weights and all packages.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peers import command
from quality import machine
from serving_peers import PACKAGES

from matquant.benchmark import bandwidth, prompt_of, times_of
from matquant.engine import Engine
from matquant.speculation import Speculation

Rates = dict[str, float]  # tokens a second of "decode" and of "prefill", and a share of "acceptance"


@dataclass(frozen=True)
class Contender:
    """about: bits, words and, where it is known, read_bytes, as the results have them."""

    key: str
    about: dict[str, Any]
    run: Callable[[], Rates]


# --- ours and llama.cpp ---------------------------------------------------------------------------------------------


def of_engine(engine: Engine, bits: int, prompt: list[int], new: int, draft: int | None = None) -> Rates:
    """Tokens a second; of decoding behind a short prompt, as llama-bench measures it."""
    engine.set_bits(bits)
    rates = {"decode": (new - 1) / times_of(engine, prompt[:1], new, draft)[1]}
    return rates if draft else rates | {"prefill": len(prompt) / times_of(engine, prompt, 1)[0]}


def of_llama_bench(program: Path, file: Path, prompt: int, new: int, threads: int) -> Rates:
    arguments = [str(program), "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", "-p", str(prompt), "-n", str(new)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(program.parent)}
    found = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment).stdout)
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in found}


def drafted(engine: Engine, bits: int, prompt: list[int], new: int, draft: int) -> Rates:
    engine.speculation = Speculation()
    return of_engine(engine, bits, prompt, new, draft) | {"acceptance": engine.speculation.acceptance}


def ours(engine: Engine, prompt: list[int], options: argparse.Namespace) -> Iterator[Contender]:
    new, widest = options.new_tokens, max(options.bits)
    for bits in options.bits:
        about = {"bits": bits, "words": "matquant", "read_bytes": engine.read_bytes(bits)}
        yield Contender(f"matquant-{bits}", about, lambda bits=bits: of_engine(engine, bits, prompt, new))
    for bits in options.head_bits:
        narrow = Engine.open(options.checkpoint, bits, head_bits=bits, threads=options.threads)
        about = {"bits": bits, "words": f"matquant, head at {bits} bits", "read_bytes": narrow.read_bytes(bits)}
        yield Contender(f"matquant-{bits}-head", about, lambda bits=bits, narrow=narrow: of_engine(narrow, bits, prompt, new))
    for draft in options.draft_bits:
        about = {"bits": widest, "words": f"matquant, drafted at {draft} bits"}
        yield Contender(f"matquant-{widest}-by-{draft}", about, lambda draft=draft: drafted(engine, widest, prompt, new, draft))


def llamas(options: argparse.Namespace) -> Iterator[Contender]:
    for peer in options.peer:
        bits, _, name = peer.partition(":")
        file, kind = Path(name), Path(name).stem.rpartition("-")[2]
        about = {"bits": int(bits), "words": f"llama.cpp {kind}", "read_bytes": file.stat().st_size}
        counts = (options.prompt_tokens, options.new_tokens, options.threads)
        yield Contender(f"llama.cpp-{kind}", about, lambda file=file, counts=counts: of_llama_bench(options.llama_bench, file, *counts))


# --- packages -------------------------------------------------------------------------------------------------------


class Peer:
    """One package's process: see serving_peers.py. Between its turns it takes no processor time (its threads spin 30 ms at most)."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        """Raises EOFError, with the last line that the process wrote, if its model cannot be loaded."""
        python = options.peer_python or sys.executable
        arguments = [str(python), "serving_peers.py", name, *(str(path.resolve()) for path in (options.dense, options.work)), str(options.threads)]
        self.log = options.work / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=Path(__file__).parent
            )
        self.versions: dict[str, str] = self._answer()["versions"]

    def ask(self, prompt: list[int], new: int) -> Rates:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        raise EOFError((self.log.read_text().strip().splitlines() or ["nothing was said"])[-1])


def packages(prompt: list[int], options: argparse.Namespace, started: dict[str, Peer], skipped: dict[str, str]) -> Iterator[Contender]:
    """One after the other, for loading takes twice a model's memory. The first run, which makes what later ones keep, is not counted."""
    for name in options.packages if options.dense else ():
        package = PACKAGES[name]
        try:
            peer = Peer(name, options)
            peer.ask(prompt, options.new_tokens)
        except EOFError as error:
            skipped[name] = str(error)
            print(f"{name} is left out: {error} ({options.work / name}.log)", flush=True)
            continue
        started[name] = peer
        yield Contender(name, {"bits": package.bits, "words": package.words}, lambda peer=peer: peer.ask(prompt, options.new_tokens))


# --- the results ----------------------------------------------------------------------------------------------------


def keep(runs: dict[str, Any], contender: Contender) -> None:
    run = runs.setdefault(contender.key, contender.about | {"rates": {}})
    for name, rate in contender.run().items():
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
    parser.add_argument("--dense", type=Path, help="an ordinary folder of the same shape, which packages read; without it there are none")
    parser.add_argument("--work", type=Path, help="where packages keep files of their own, and what they write to stderr")
    parser.add_argument("--peer-python", type=Path, help="of the packages' environment; by default this one")
    parser.add_argument("--packages", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    options = parser.parse_args()
    if options.dense and not options.work:
        parser.error("--dense needs --work")
    return options


def main() -> None:
    options = arguments()
    if options.dense:
        options.work.mkdir(parents=True, exist_ok=True)
    started: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    engine = Engine.open(options.checkpoint, max(options.bits), max(options.bits), threads=options.threads)
    prompt = prompt_of(engine, options.prompt_tokens)
    runs: dict[str, Any] = {}
    probes: list[float] = []
    try:
        contenders = [*packages(prompt, options, started, skipped), *ours(engine, prompt, options), *llamas(options)]
        for done in range(options.rounds):
            probes.append(round(bandwidth(options.threads), 1))
            for contender in contenders:
                keep(runs, contender)
            probes.append(round(bandwidth(options.threads), 1))
            print(done, {key: {name: rates[-1] for name, rates in run["rates"].items()} for key, run in runs.items()}, probes[-2:], flush=True)
    finally:
        for peer in started.values():
            peer.close()
    for run in runs.values():
        run |= {
            "median": {name: median(rates) for name, rates in run["rates"].items()},
            "best": {name: max(rates) for name, rates in run["rates"].items()},
        }
    setting = {name: getattr(options, name) for name in ("name", "prompt_tokens", "new_tokens", "rounds", "threads")}
    about = machine() | {"isa": engine.stepper.head.isa, "processor": processor(), "llama.cpp": options.built}
    about["packages"] = {name: peer.versions for name, peer in started.items()}
    result = {"setting": setting, "command": command(), "machine": about, "probe_gb_s": probes, "skipped": skipped, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
