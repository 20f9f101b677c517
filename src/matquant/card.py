"""The model card: README.md of a checkpoint, made from its report alone, with nothing in it that is fetched from elsewhere."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from matquant.codes import planes_needed
from matquant.evaluate import Protocol
from matquant.recipe import Recipe
from matquant.report import LayerReport, Report, Table, layer_rows, overflow_words, public, quality_rows, skipped_rows, tuned_words

LICENSE_KEYS = ("license", "license_name", "license_link")
IMAGES = {"quality.svg": "KL and perplexity against bits per weight", "errors.svg": "relative errors along the depth of the model"}
WORST = 5  # layers named in the card; report.json has all
MAX_CARD_BYTES = 2**16  # the license stands at the top


def model_card(report: Report, license: Mapping[str, str] | None = None, images: Collection[str] = ()) -> str:
    """README.md. license: front matter of the base model's card (`base_license`). images: names of plots in the same folder."""
    name = Path(report.model).name or report.model
    widths = _listed([str(bits) for bits in report.recipe.bits])
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(report, license or {}), sort_keys=False, allow_unicode=True) + "---",
        f"# {_plain(name)} at {widths} bits",
        f"One checkpoint of {_code(report.base_model or name)} that is read at {widths} bits per weight, or at another width in every layer, "
        "without quantizing again: each narrower weight is read from the leading bits of the same stored code (Matryoshka quantization).",
        *_quality(report, images),
        *_usage(report.recipe),
        *_making(report),
        *_limits(report, bool(license)),
    ]
    return "\n\n".join(parts) + "\n"


def base_license(folder: Path) -> dict[str, str]:
    """What the card in the base model's folder says about its license; empty if there is no card or it does not say."""
    try:
        text = (folder / "README.md").read_bytes()[:MAX_CARD_BYTES].decode("utf-8", errors="replace")
        head = text.removeprefix("---").partition("\n---")[0] if text.startswith("---") else ""
        data: Any = yaml.safe_load(head)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        return {}
    found = cast(dict[Any, Any], data) if isinstance(data, dict) else {}
    return {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)} if isinstance(found.get("license"), str) else {}


def _front_matter(report: Report, license: Mapping[str, str]) -> dict[str, Any]:
    base = {"base_model": report.base_model, "base_model_relation": "quantized"} if report.base_model else {}
    tags = ["matquant", "matryoshka", "quantized", *(f"{bits}-bit" for bits in report.recipe.bits)]
    return {**base, "library_name": "matquant", **license, "pipeline_tag": "text-generation", "tags": tags}


# --- sections ---------------------------------------------------------------------------------------------------------


def _quality(report: Report, images: Collection[str]) -> list[str]:
    if not report.rows:
        return ["## Quality", "Not measured. `matquant eval DIR --reference MODEL` does it."]
    image = [f"![{words}]({name})" for name, words in IMAGES.items() if name in images]
    words = [
        "Bits per weight count scales and zeros: of the quantized weights, then of the whole model. "
        "*To fetch* is every file that a reader of that width needs."
    ]
    if any(row.kl is not None for row in report.rows):
        words = [
            f"{words[0]} KL is the divergence from the original to the checkpoint in nats per token, as mean and as 99.9 % quantile; "
            "top-1 is how often both find the same token most probable."
        ]
    return ["## Quality", _markdown(quality_rows(report.rows)), *image, *words, _protocol(report.protocol)]


def _protocol(protocol: Protocol | None) -> str:
    if protocol is None:
        return "How it was measured is not recorded."
    return (
        f"Measured on {protocol.tokens} tokens in {protocol.sequences} sequences of {protocol.seq_len}, stride {protocol.stride}; "
        f"beginning-of-sequence: {_plain(protocol.bos)}; text: {_code(public(protocol.text))}. The first token of a sequence is not scored."
    )


def _usage(recipe: Recipe) -> list[str]:
    middle = sorted(recipe.bits)[len(recipe.bits) // 2]
    low = min(recipe.bits)
    python = f"""```python
import matquant
from transformers import AutoTokenizer

model = matquant.from_pretrained("DIR", bits={middle}, keep={max(recipe.bits)})  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained("DIR")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))

matquant.set_bits(model, {low})  # the same weights, narrower, without loading again
```"""
    shell = f"""```sh
pip install matquant
matquant generate DIR "Once upon a time" --bits {middle}
matquant eval DIR --bits {",".join(map(str, recipe.bits))}
matquant inspect DIR
matquant verify DIR
```"""
    return ["## Use", python, shell, _partial_download(recipe, middle)]


def _partial_download(recipe: Recipe, bits: int) -> str:
    last = planes_needed(bits, recipe.parent_bits, recipe.slicing) - 1
    if last >= recipe.parent_bits - 1:
        return "Every width needs all weight files."
    planes = {1: "", 2: " and `model-plane2-*`", 3: ", `model-plane2-*` and `model-plane3-*`"}.get(
        last, f" and `model-plane2-*` to `model-plane{last}-*`"
    )
    return f"To read at most {bits} bits, only `model-base-*`{planes} are needed of the weight files; the others need not be downloaded."


def _making(report: Report) -> list[str]:
    recipe = report.recipe
    groups = "one scale a row" if recipe.group_size == -1 else f"groups of {recipe.group_size}"
    zero = "symmetric" if recipe.symmetric else "asymmetric"
    targets = ", ".join(f"{bits} bits: {lam:g}" for bits, lam in recipe.targets.items())
    text = "text sampled from the model itself" if recipe.calibration == "self" else _code(public(recipe.calibration))
    calibrated = [
        f"calibrated on {recipe.num_samples} sequences of {recipe.seq_len} tokens: {text}, seed {recipe.seed}",
        f"weights of the widths in the objective: {targets}",
    ]
    facts = [
        f"{recipe.parent_bits}-bit codes, {groups}, {zero}, {recipe.scale_dtype} scales, slicing `{recipe.slicing}`, method `{recipe.method}`",
        *(
            [f"output head and embeddings rounded to nearest at {recipe.head_bits} bits, whatever the width of the layers"]
            if recipe.head_bits
            else []
        ),
        *(calibrated if recipe.method != "minmax" else []),
        *(words for words in (tuned_words(report), overflow_words(report)) if words),
        "every setting is in config.json, under `recipe`, with its hash",
    ]
    skipped = ["Left as they are:", _markdown(skipped_rows(report.skipped))] if report.skipped else []
    return ["## How it was made", "\n".join(f"* {fact}" for fact in facts), *_worst(report.layers), *skipped]


def _worst(layers: Sequence[LayerReport]) -> list[str]:
    widths = sorted({bits for layer in layers for bits in layer.errors})
    if not widths:
        return []
    worst = sorted(layers, key=lambda layer: -(layer.errors.get(widths[0]) or 0.0))[:WORST]
    said = f"The {len(worst)} layers with the largest relative output error at {widths[0]} bits, of {len(layers)} (report.json has all):"
    return [said, _markdown(layer_rows(worst))]


def _limits(report: Report, licensed: bool) -> list[str]:
    limits = [
        "Perplexity, KL and top-1 on one text do not tell how a task of yours fares; measure it at the width you mean to use.",
        "Every narrower width loses quality, two bits a lot. What the base model gets wrong or should not be used for, this one does too.",
        "The format needs the matquant package; loaders that do not know it refuse the files.",
    ]
    if not licensed:
        limits.append("The license of the base model applies; it is not recorded here.")
    if report.rows and report.protocol is not None and report.protocol.tokens < 10_000:
        limits.append(f"{report.protocol.tokens} tokens are few: small differences between lines of the table may be chance.")
    return ["## Limits", "\n".join(f"* {limit}" for limit in limits)]


# --- markdown ---------------------------------------------------------------------------------------------------------


def _markdown(table: Table) -> str:
    """Numbers to the right; a column of text (the first, and notes) to the left."""
    text = {0, *(i for i, header in enumerate(table.headers) if header in ("notes", "left as it is because"))}
    rule = [":--" if i in text else "--:" for i in range(len(table.headers))]
    lines = [table.headers, rule, *([_plain(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """On one line and with nothing that markdown or HTML would take for its own."""
    line = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\|`*_<>[]!#" else char for char in line)


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
