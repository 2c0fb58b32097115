"""The page about a run: what was trained on what, what it scores, what it says, what it took.

`write_report(run_dir)` reads the run directory alone (config.yaml, */done.json, */metrics.jsonl, evals/*.json) and
writes report.md with plots in report/. A stage or a figure that is not there is a dash; nothing is estimated.
`python run_speedrun.py --run-dir DIR --stages report` writes it anew.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from evals.plots import Series, draw
from nanochat_jax.config import RunConfig, dump_yaml, load_config
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text, read_json
from nanochat_jax.tracking import system_info

STAGES = ("base", "mid", "sft", "rl")
TITLES = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spellingbee": "SpellingBee",
}
SAMPLE_CHARS = 700  # of a completion that the page shows
DASH = "-"


def write_report(run_dir: str | Path) -> Path:
    """Writes report.md and report/*.png into the run directory and returns the page's path."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); train one with run_speedrun.py")
    run = _Run(run_dir)
    sections = [
        _header(run),
        _scores(run),
        _curves(run),
        _time_and_cost(run),
        _samples(run),
        _core_by_task(run),
        _system(run),
        _settings(run),
    ]
    path = run_dir / "report.md"
    atomic_write_text(path, "\n\n".join(s for s in sections if s) + "\n")
    return path


class _Run:
    """What a run directory says, read once."""

    def __init__(self, run_dir: Path):
        self.dir = run_dir
        self.config: RunConfig = load_config(run_dir / "config.yaml")
        self.done = {s: read_json(run_dir / s / "done.json") for s in ("tokenizer", *STAGES, "eval")}
        self.evals = {s: read_json(run_dir / "evals" / f"{s}.json") for s in STAGES}
        self.metrics = {s: read_metrics(run_dir / s / "metrics.jsonl") for s in STAGES}

    def peak_memory_gb(self) -> float | None:
        """The largest that any stage or evaluation recorded."""
        marks = [*self.done.values(), *self.evals.values()]
        found = [m["peak_memory_gb"] for m in marks if m and m.get("peak_memory_gb")]
        return max(found, default=None)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a kill cut in half is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fold(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def duration(seconds: float | None) -> str:
    """3723 -> 1 h 02 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_ = divmod(minutes, 60)
    return f"{hours} h {minutes_:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(n: float | None) -> str:
    """12345678 -> 12.3 M."""
    if n is None:
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


# ------------------------------------------------------------------------------------------------- sections


def _header(run: _Run) -> str:
    model, seconds = run.config.model, [d["seconds"] for d in run.done.values() if d]
    words = [f"A {model.arch} GPT of depth {model.depth}"]
    parameters = _parameters(run)
    if parameters:
        words.append(f"with {count(parameters)} parameters")
    if run.done["base"] and run.done["base"].get("tokens"):
        words.append(f"pretrained on {count(run.done['base']['tokens'])} tokens")
    trained = [s for s in STAGES if run.done[s]]
    text = ", ".join(words) + "."
    if trained:
        text += f" Stages that ended: {', '.join(trained)}; {duration(sum(seconds))} in all."
    unfinished = [s for s in STAGES if run.metrics[s] and not run.done[s]]
    if unfinished:
        text += f" Still under way, or stopped: {', '.join(unfinished)}."
    return f"# {run.dir.resolve().name}\n\n{text}"


def _parameters(run: _Run) -> int | None:
    if not (run.dir / "tokenizer" / "tokenizer.model").is_file():
        return None
    from nanochat_jax import scaling
    from tokenizer import Tokenizer

    vocab = Tokenizer.load(run.dir / "tokenizer").vocab_size
    return scaling.param_counts(scaling.gpt_config(run.config.model, vocab))["total"]


class _Notes:
    """Numbered footnotes; the same text gets the same number."""

    def __init__(self):
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def __str__(self):
        return "\n".join(f"{i}. {text}" for i, text in enumerate(self.texts, 1))


def _plus_minus(value: float, stderr: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def _scores(run: _Run) -> str:
    if not any(run.evals.values()):
        return "## Scores\n\nNo stage has been evaluated."
    notes, rows = _Notes(), []

    def row(title: str, chance: str, cell) -> None:
        cells = [(cell(run.evals[s], s) if run.evals[s] else None) or DASH for s in STAGES]
        if any(c != DASH for c in cells):
            rows.append([title, chance, *cells])

    def bpb(e, _):
        return f"{e['bpb']['bpb']:.4f}" if e.get("bpb") and e["bpb"]["bpb"] is not None else None

    def below(e, _):
        share = e["bpb"].get("below_unigram") if e.get("bpb") else None
        return f"{100 * share:.1f} %" if share is not None else None

    row("bits per byte", DASH, bpb)
    row("below a byte unigram", "0 %", below)
    row("CORE", "0", lambda e, _: _core_cell(e.get("core"), notes))
    for name in _task_names(run):
        chance = next(f"{e['chat'][name]['baseline']:.2f}" for e in run.evals.values() if e and name in e["chat"])
        row(TITLES.get(name, name), chance, lambda e, s, name=name: _task_cell(e["chat"].get(name), notes))
    row("ChatCORE", "0", lambda e, _: _chatcore_cell(e.get("chatcore"), notes))
    head = ["", "chance", *(s.upper() for s in STAGES)]
    text = "Accuracies with their standard error. CORE and ChatCORE are means of accuracies centred at chance."
    return f"## Scores\n\n{table(head, rows)}\n\n{text}\n\n{notes}".rstrip()


def _task_names(run: _Run) -> list[str]:
    """The usual six first, then what else was asked, in the order of the evaluations."""
    asked = dict.fromkeys(name for e in run.evals.values() if e for name in e["chat"])
    return [n for n in TITLES if n in asked] + [n for n in asked if n not in TITLES]


def _task_cell(task: dict | None, notes: _Notes) -> str | None:
    if not task:
        return None
    mark = notes.mark(f"{task['n']} of {task['of']} questions.") if task["n"] < task.get("of", task["n"]) else ""
    return _plus_minus(task["accuracy"], task.get("stderr")) + mark


def _core_cell(core: dict | None, notes: _Notes) -> str | None:
    if not core or core["core_metric"] is None:
        return None
    said = []
    if core["missing"]:
        said.append(f"no data for {', '.join(core['missing'])}")
    if core.get("substitutes"):
        said.append("stand-ins for " + ", ".join(f"{k} ({v})" for k, v in core["substitutes"].items()))
    if core.get("cropped"):
        said.append(f"prompts longer than the context cropped at the left in {len(core['cropped'])} tasks")
    if core.get("max_per_task"):
        said.append(f"at most {core['max_per_task']} examples a task")
    mark = ""
    if said:
        kind = "Partial CORE" if core["partial"] else "CORE"
        mark = notes.mark(f"{kind}: {core['n_tasks']} of {core['total_tasks']} tasks; {'; '.join(said)}.")
    return _plus_minus(core["core_metric"], core.get("core_stderr"), 4) + mark


def _chatcore_cell(score: dict | None, notes: _Notes) -> str | None:
    if not score or score["score"] is None:
        return None
    mark = ""
    if score["partial"]:
        missing = ", ".join(TITLES.get(n, n) for n in score["missing"])
        over = ", ".join(TITLES.get(n, n) for n in score["tasks"])
        mark = notes.mark(f"Partial ChatCORE: over {over}; without {missing}.")
    return _plus_minus(score["score"], score.get("stderr"), 4) + mark


def _points(records: list[dict], *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have one of the keys (the first that they have)."""
    found = [(r["step"], next((r[k] for k in keys if r.get(k) is not None), None)) for r in records]
    found = [(x, y) for x, y in found if y is not None]
    return [x for x, _ in found], [y for _, y in found]


def _curves(run: _Run) -> str:
    folder, images = run.dir / "report", []

    def add(name: str, title: str, y_label: str, series: list[Series], **style) -> None:
        series = [s for s in series if len(s.x)]
        if series:
            draw(folder / f"{name}.png", title, y_label, series, **style)
            images.append(f"![{title}](report/{name}.png)")

    add("base_loss", "Base: training loss", "nats per token", [Series("", *_points(run.metrics["base"], "loss"), True)])
    bpb = [Series(s, *_points(run.metrics[s], "val_bpb", "bpb"), marks=True) for s in ("base", "mid", "sft")]
    add("bpb", "Validation bits per byte", "bits per byte", bpb)
    tuned = [Series(s, *_points(run.metrics[s], "loss"), True) for s in ("mid", "sft")]
    add("finetune_loss", "Mid and SFT: training loss", "nats per token", tuned)
    rl = run.metrics["rl"]
    reward = Series("mean reward while training", *_points(rl, "reward"), True)
    ks = sorted({k for r in rl for k in r if k.startswith("pass@")}, key=lambda k: int(k[5:]))
    passed = [Series(f"{k} on held-out questions", *_points(rl, k), marks=True) for k in ks]
    shown = passed[:1] + (passed[-1:] if len(passed) > 1 else [])
    add("reward", "RL: reward", "share of answers that are right", [reward, *shown], share=True)
    add("rl_length", "RL: length of answers", "tokens", [Series("", *_points(rl, "completion_tokens"), True)])
    add("rl_entropy", "RL: entropy of the policy", "nats per token", [Series("", *_points(rl, "entropy"), True)])
    return "## Curves\n\n" + "\n\n".join(images) if images else ""


def _time_and_cost(run: _Run) -> str:
    price, rows, total = run.config.price_per_hour, [], 0.0

    def cost(seconds: float) -> str:
        return "n/a" if price is None else f"${seconds / 3600 * price:.2f}"

    for stage, mark in run.done.items():
        if not mark:
            continue
        total += mark["seconds"]
        records = [r for r in run.metrics.get(stage, []) if r.get("tokens_per_second")]
        rate = statistics.median(r["tokens_per_second"] for r in records) if records else None
        shares = [r["mfu"] for r in records if r.get("mfu") is not None]
        rows.append(
            [
                stage,
                f"{mark['steps']:,}" if mark.get("steps") else DASH,
                count(mark.get("tokens")),
                count(rate),
                f"{100 * statistics.median(shares):.1f} %" if shares else "n/a" if records else DASH,
                duration(mark["seconds"]),
                cost(mark["seconds"]),
            ]
        )
    if not rows:
        return ""
    rows.append(["**all**", "", "", "", "", f"**{duration(total)}**", f"**{cost(total)}**"])
    head = ["stage", "steps", "tokens", "tokens/s", "MFU", "time", "cost"]
    peak = run.peak_memory_gb()
    words = [
        f"Cost at ${price:.2f} an hour." if price is not None else "Cost is n/a: price_per_hour is not set.",
        f"Peak memory: {peak:.1f} GB." if peak else "",
    ]
    return f"## Time and cost\n\n{table(head, rows)}\n\n{' '.join(words).strip()}"


def _said(sample: dict) -> str:
    """A completion as one text, its tool calls in GSM8K's notation, cut to length."""
    marks = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    parts = sample.get("parts") or [{"type": "text", "text": sample["completion"]}]
    text = "".join(marks[p["type"]].format(p["text"]) for p in parts)
    return text[:SAMPLE_CHARS] + (" ..." if len(text) > SAMPLE_CHARS else "")


def _samples(run: _Run) -> str:
    stages = [s for s in STAGES if run.evals[s] and run.evals[s].get("samples")]
    if not stages:
        return ""
    blocks = []
    for stage in stages:
        lines = []
        for sample in run.evals[stage]["samples"]:
            gap = "\n" if stage != "base" else ""
            said = _said(sample) if stage == "base" else _said(sample).strip()
            lines.append(f"> {sample['prompt']}{gap}{said}")
        text = "\n\n".join(lines)
        fence = "```"
        while fence in text:
            fence += "`"
        block = f"{fence}text\n{text}\n{fence}"
        blocks.append(f"**{stage.upper()}**\n\n{block}" if stage == stages[-1] else fold(stage.upper(), block))
    return "## Samples\n\nGreedy, cut to length.\n\n" + "\n\n".join(reversed(blocks))


def _core_by_task(run: _Run) -> str:
    blocks = []
    for stage in STAGES:
        core = (run.evals[stage] or {}).get("core")
        if not core or not core["results"]:
            continue
        rows = []
        for name, accuracy in core["results"].items():
            stand_in = core.get("substitutes", {}).get(name)
            rows.append(
                [
                    f"{name} ({stand_in})" if stand_in else name,
                    str(core.get("n", {}).get(name, DASH)),
                    _plus_minus(accuracy, core.get("stderr", {}).get(name)),
                    f"{core['centered'][name]:.3f}",
                ]
            )
        rows += [[name, DASH, DASH, DASH] for name in core["missing"]]
        blocks.append(fold(f"CORE of {stage}, task by task", table(["task", "examples", "accuracy", "centred"], rows)))
    return "\n\n".join(blocks)


def _system(run: _Run) -> str:
    info = system_info()
    devices = info["devices"]
    kinds = [f"{devices.count(k)} x {k}" if devices.count(k) > 1 else k for k in dict.fromkeys(devices)]
    rows = [
        ["processor", f"{info['cpu']}, {info['cores']} cores"],
        ["memory", f"{info['memory_gb']} GB"],
        ["devices", ", ".join(kinds)],
        ["software", f"{info['os']}, Python {info['python']}, jax {info['jax']}, flax {info['flax']}"],
        ["git commit", info["commit"] or "n/a"],
    ]
    return f"## System\n\n{table(['', ''], rows)}"


def _settings(run: _Run) -> str:
    c = run.config
    source = c.data.source if c.data.source != "auto" else ("local" if c.data.dir else "embedded")
    rows = [
        ["model", f"{c.model.arch}, depth {c.model.depth}, context {c.model.sequence_len}"],
        ["tokenizer", f"{c.tokenizer.vocab_size:,} entries"],
        ["data", source],
        ["seed", str(c.seed)],
    ]
    tokenizer = run.done["tokenizer"]
    measured = (tokenizer or {}).get("metrics", {}).get("bytes_per_token")
    if isinstance(measured, dict):
        numbers = {k: v for k, v in measured.items() if isinstance(v, (int, float))}
        if numbers:
            rows.insert(2, ["bytes per token", ", ".join(f"{k} {v:.2f}" for k, v in numbers.items())])
    body = fold("All settings", f"```yaml\n{dump_yaml(c).strip()}\n```")
    return f"## Settings\n\n{table(['', ''], rows)}\n\n{body}"
