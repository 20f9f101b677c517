"""Generated parts about time: quantizing, serving, drafts, GPU kernels."""

from typing import Any

from tables import counts, load, markdown, name_of


def speed(model: str) -> str:
    """Seconds of quantizing a model's first blocks, part by part."""
    stored = load(model, "speed")
    setting, rows = stored["setting"], stored["rows"]
    base = next(row for row in rows if row["variant"] == "classic")["seconds"]["total"]
    parts = list(dict.fromkeys(part for row in rows for part in row["seconds"] if part != "total"))
    table = [[row["words"], *(f"{row['seconds'].get(part, 0.0):.1f}" for part in parts)] for row in rows]
    for line, row in zip(table, rows, strict=True):
        line += [f"{row['seconds']['total']:.1f}", f"{row['seconds']['total'] / base:.2f}"]
    return (
        f"    {stored['command']}\n\nSeconds, blocks: {setting['blocks']}, groups of {setting['group_size']}, {counts([setting['num_samples'], setting['seq_len']])}, "
        f"{stored['machine']['threads']} threads, torch {stored['machine']['versions']['torch']}, float32.\n\n"
        + markdown(["", *parts, "total", "of classic"], table)
    )


def serving(model: str) -> str:
    """Tokens a second of the engine, of llama.cpp and of other packages, in alternation."""
    stored = load(model, "serving")
    setting, about, runs = stored["setting"], stored["machine"], stored["runs"]
    ours = {run["bits"]: run["median"] for run in runs.values() if run["words"] == "matquant"}

    def both(run: dict[str, Any], name: str) -> str:
        if name not in run["median"]:
            return ""
        pair = (run["median"][name], run["best"][name])
        return "{} ({})".format(*(f"{rate:.0f}" if min(pair) >= 10 else f"{rate:.1f}" for rate in pair))

    def over(run: dict[str, Any], name: str) -> str:
        theirs = not run["words"].startswith("matquant") and name in run["median"]
        return f"{ours.get(run['bits'], ours[max(ours)])[name] / run['median'][name]:.2f}" if theirs else ""

    def read(run: dict[str, Any]) -> str:
        return f"{run['read_bytes'] * run['median']['decode'] / 1e9:.1f}" if run["words"] == "matquant" else ""

    def accepted(run: dict[str, Any]) -> str:
        return f"{run['median']['acceptance']:.0%}" if "acceptance" in run["median"] else ""

    order = sorted(runs.values(), key=lambda run: (-run["bits"], not run["words"].startswith("matquant")))
    rows = [
        [
            str(run["bits"]),
            run["words"],
            both(run, "decode"),
            over(run, "decode"),
            read(run),
            both(run, "prefill"),
            over(run, "prefill"),
            accepted(run),
        ]
        for run in order
    ]
    head = ["bits", "", "decode", "ours is times that", "GB/s of weights", "prefill", "ours is times that", "drafts accepted"]
    return (
        f"    {stored['command']}\n\n{setting['name']}. {about['processor']}, {setting['threads']} threads, {about['isa']}. llama.cpp: {about['llama.cpp']}. Tokens a second: median (best) of "
        f"{setting['rounds']} rounds in alternation, prompts of {setting['prompt_tokens']} tokens, {setting['new_tokens']} new ones. A probe read "
        f"{min(stored['probe_gb_s']):.0f} to {max(stored['probe_gb_s']):.0f} GB/s.{_packages(stored, max(ours))}\n\n" + markdown(head, rows)
    )


def drafts(model: str) -> str:
    """Self-speculation on several texts: speed-ups, acceptance, and what the text itself gave."""
    stored = load(model, "drafts")
    setting, about, rows = stored["setting"], stored["machine"], []
    words = {"both": "from the text, else by {bits} bits", "text": "from the text alone", "read": "by {bits} bits alone, always"}
    for text, runs in stored["texts"].items():
        for run in runs.values():
            if "source" not in run:
                continue
            accepted = f"{run['acceptance']:.0%}" if run["counts"]["drafted"] else ""
            copied = f"{run['counts']['stood'] / run['counts']['made']:.0%}"
            cells = [f"{run['median']:.2f}", accepted, copied, f"{run['tokens_per_pass']:.2f}"]
            rows.append([name_of(text), words[run["source"]].format(bits=run["bits"]), *cells])
    head = ["text", "drafts", "times plain decoding at 8 bits", "accepted by width", "tokens copied", "tokens a pass"]
    plain = ", ".join(f"{runs['plain']['median']:.0f} ({name_of(text)})" for text, runs in stored["texts"].items())
    return (
        f"    {stored['command']}\n\n{setting['name']}. {about['processor']}, {setting['threads']} threads, {about['isa']}; {setting['count']} prompts of each text, "
        f"{setting['new_tokens']} greedy tokens behind each, medians of {setting['rounds']} rounds in alternation. Plain decoding, tokens a second: {plain}.\n\n"
        + markdown(head, rows)
    )


def _packages(stored: dict[str, Any], widest: int) -> str:
    """Versions of the packages beside llama.cpp, what float weights are compared with, and which packages are left out."""
    versions = dict.fromkeys(f"{name} {number}" for own in stored["machine"].get("packages", {}).values() for name, number in own.items())
    words = f" {', '.join(versions)}: heads as narrow as the layers; 32 and 16 bits are compared with ours at {widest}." if versions else ""
    return words + "".join(f" Left out: {name} ({reason})." for name, reason in stored.get("skipped", {}).items())


def gpu(name: str) -> str:
    """Products on a GPU: against targets and what others published, all shapes against the library's 16 bits, and decode."""
    stored = load(name, "gpu")
    about, rows, copy = stored["machine"], stored["rows"], stored["machine"]["copy_gigabytes_per_second"]
    us = {(row["bits"], row["batch"], row["shape"]): row for row in rows}
    shapes, batches = list(dict.fromkeys(row["shape"] for row in rows)), sorted({row["batch"] for row in rows})
    widths = sorted({row["bits"] for row in rows} - {16})
    goals = {(goal["bits"], goal["what"].split(",")[0]): goal for goal in stored["targets"]}
    published = {kernel: {int(bits): time for bits, time in times.items()} for kernel, times in stored["published_h200"].items()}
    first = []
    for bits in [*widths, 16]:
        row = us[bits, 1, shapes[0]]
        goal = goals.get((bits, "us at batch 1"), {}).get("target")
        share = f"{row['bytes'] / row['us'] / 1e3 / copy:.0%}" if "bytes" in row else f"{2 * _weights(shapes[0]) / row['us'] / 1e3 / copy:.0%}"
        theirs = ", ".join(f"{kernel} {times[bits]:g}" for kernel, times in published.items() if bits in times)
        ratio = [
            f"{goals[bits, what]['found']:.2f}" if (bits, what) in goals else ""
            for what in ("batch 16 over batch 1", "speed over dense at batch 256")
        ]
        first.append([str(bits), f"{row['us']:.1f}", "" if goal is None else f"{goal:g}", theirs, share, *ratio])
    head = ["bits", "us", "target", "published for this card, us", "of a copy's bandwidth", "batch 16 over batch 1 (at most 1.3)", "speed over 16 bits at batch 256 (at least .9)"]  # fmt: skip
    parts = [
        f"    {stored['command']}\n\n{about['gpu']}, torch {about['versions']['torch']}, Triton {about['versions']['triton']}, {stored['dtype']}, groups of {stored['group_size']}, "
        f"weights out of the cache; a copy moves {copy / 1e3:.2f} TB/s.\n\n{shapes[0]}, batch 1:\n\n{markdown(head, first)}"
    ]
    table = [
        [shape, str(batch), *(f"{us[bits, batch, shape]['us']:.1f}" for bits in [*widths, 16])]
        for batch in batches for shape in shapes if (16, batch, shape) in us
    ]  # fmt: skip
    parts.append(f"All shapes, microseconds:\n\n{markdown(['out x in', 'batch', *(str(bits) for bits in widths), '16 (cuBLAS)'], table)}")
    speeds = {row["bits"]: row["tokens_per_second"] for row in stored["decode"]}
    parts.append(
        "Decode of a random model of Llama-3-8B's shape, one sequence, a CUDA graph a width, tokens/s (all but the linear layers is plain torch):\n\n"
        + markdown([str(bits) for bits in sorted(speeds)], [[f"{speeds[bits]:.0f}" for bits in sorted(speeds)]])
    )
    return "\n".join(parts)


def _weights(shape: str) -> int:
    out, columns = (int(part) for part in shape.split("x"))
    return out * columns
