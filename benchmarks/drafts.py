"""Self-speculation against plain decoding, in alternation, on continuations of a text and on answers to questions: tokens a second and what drafts were worth.

    python benchmarks/drafts.py CHECKPOINT --name WORDS --out results.json --draft-bits 4 3 2
        --text FILE [--text FILE ...] --questions FILE.jsonl:FIELD [...] [--count 8] [--prompt-tokens 64] [--new-tokens 128] [--rounds 3] [--threads 2]

A text gives the beginnings of its first `count` long paragraphs, a file of questions its first `count` as chats. All is decoded greedily at the widest width,
and output with drafts must be that without. Besides drafts as they are used (from the text itself first, then from the narrow read), either
source alone: "text" and "read"; the read alone is asked at every pass, whether it pays or not. Speed-ups are medians over rounds of the
ratio to the same round's plain decoding.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from peers import command
from quality import machine
from serving import processor

from matquant.calibration import read_texts
from matquant.cli.run import load_tokenizer
from matquant.engine import Engine
from matquant.speculation import MOST_DRAFTED, Echo, Narrow, Speculation

SOURCES = ("both", "text", "read")


@contextmanager
def only(source: str) -> Iterator[None]:
    """Drafts of one source."""
    with ExitStack() as stack:
        if source == "read":
            stack.enter_context(patch.object(Echo, "draft", lambda self, most: []))
            stack.enter_context(patch.object(Narrow, "worth", lambda self: MOST_DRAFTED))
        if source == "text":
            stack.enter_context(patch.object(Narrow, "worth", lambda self: 0))
        yield


def beginnings(tokenizer: Any, file: str, count: int, length: int) -> list[list[int]]:
    paragraphs = [line for text in read_texts(file) for line in text.splitlines()]
    long = (ids for line in paragraphs if len(ids := list(tokenizer(line).input_ids)) > 2 * length)
    return [ids[:length] for ids, _ in zip(long, range(count), strict=False)]


def chats(tokenizer: Any, spec: str, count: int) -> list[list[int]]:
    file, _, name = spec.rpartition(":")
    asked = [json.loads(line)[name] for line in Path(file).read_text().splitlines()[:count]]
    turn = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [tokenizer.apply_chat_template([{"role": "user", "content": words}], **turn) for words in asked]


def decode(engine: Engine, prompts: list[list[int]], new: int, draft: int | None) -> tuple[float, list[list[int]]]:
    """(seconds behind the first token of each, what was written)."""
    seconds, written = 0.0, []
    for prompt in prompts:
        tokens = engine.generate(prompt, new, draft_bits=draft)
        first = next(tokens)
        started = time.perf_counter()
        written.append([first, *tokens])
        seconds += time.perf_counter() - started
    return seconds, written


def measure(engine: Engine, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Setting -> rates and speed-ups, one a round, and counts."""
    runs: dict[str, Any] = {"plain": {"rates": []}}
    made = len(prompts) * (options.new_tokens - 1)
    for done in range(options.rounds):
        plain, want = decode(engine, prompts, options.new_tokens, None)
        runs["plain"]["rates"].append(round(made / plain, 2))
        for source in SOURCES:
            for bits in options.draft_bits[:1] if source == "text" else options.draft_bits:
                key = source if source == "text" else f"{source}-{bits}"
                engine.speculation = Speculation()
                with only(source):
                    seconds, written = decode(engine, prompts, options.new_tokens, bits)
                assert written == want, f"drafts ({key}) changed the output"
                run = runs.setdefault(key, {"source": source, "bits": bits, "rates": [], "speedups": []})
                run["rates"].append(round(made / seconds, 2))
                run["speedups"].append(round(plain / seconds, 3))
                run |= {
                    "counts": vars(engine.speculation),
                    "acceptance": engine.speculation.acceptance,
                    "tokens_per_pass": engine.speculation.per_pass,
                }
        print(done, {key: run["rates"][-1] for key, run in runs.items()}, flush=True)
    for run in runs.values():
        run["median"] = median(run.get("speedups", run["rates"]))
    return runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="of the model, in tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draft-bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--questions", action="append", default=[], metavar="FILE:FIELD")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    engine, tokenizer = Engine.open(options.checkpoint, 8, 8, threads=options.threads), load_tokenizer(str(options.checkpoint))
    texts = {Path(file).name: beginnings(tokenizer, file, options.count, options.prompt_tokens) for file in options.text}
    texts |= {Path(spec.rpartition(":")[0]).name: chats(tokenizer, spec, options.count) for spec in options.questions}
    found = {}
    for name, prompts in texts.items():
        print(name, len(prompts), "prompts", flush=True)
        found[name] = measure(engine, prompts, options)
    setting = {name: getattr(options, name) for name in ("name", "count", "prompt_tokens", "new_tokens", "rounds", "threads")}
    about = machine() | {"isa": engine.stepper.head.isa, "processor": processor()}
    options.out.write_text(json.dumps({"setting": setting, "command": command(), "machine": about, "texts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
