"""Generated parts about time: quantizing, serving, drafts."""

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
