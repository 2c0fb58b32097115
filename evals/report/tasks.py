"""Task by task: CORE, subjects, and further answers drawn for pass@k."""

from __future__ import annotations

from evals.report.facts import STAGES, Facts, titled
from evals.report.plots import Bar, bars
from nanochat_jax.words import DASH, fold, plain, plus_minus, table


def core(facts: Facts) -> str:
    """A chart and a table for each stage that has CORE."""
    blocks = []
    for stage in STAGES:
        found = facts.core(stage)
        if not found:
            continue
        name = f"core_{stage}"
        chart = [_core_bar(found, task) for task in sorted(found["results"], key=found["centered"].get)]
        marks = "the right answers, where the bundle states wrong ones" if found.get("corrected") else ""
        bars(
            facts.dir / "report" / f"{name}.png",
            f"CORE of {stage}, task by task" + (" (* stand-in data)" if found.get("substitutes") else ""),
            "accuracy centred at chance",
            chart,
            other=marks,
            mean=(found["core_metric"], "CORE"),
        )
        blocks.append(f"![CORE of {stage} by task](report/{name}.png)\n\n{fold('As a table', _core_table(found))}")
    return "\n\n".join(["## CORE by task", *blocks]) if blocks else ""


def _core_bar(core: dict, task: str) -> Bar:
    accuracy, centered = core["results"][task], core["centered"][task]
    # centred = (accuracy - chance) / (1 - chance), so that this is 1 / (1 - chance)
    scale = (1 - centered) / (1 - accuracy) if accuracy < 1 else 1.0
    right = core.get("corrected", {}).get(task)
    return Bar(
        task + ("*" if task in core.get("substitutes", {}) else ""),
        centered,
        scale * core.get("stderr", {}).get(task, 0.0),
        None if right is None else centered + scale * (right - accuracy),
    )


def _core_table(core: dict) -> str:
    rows = []
    for task, accuracy in core["results"].items():
        name, stand_in = plain(task), core.get("substitutes", {}).get(task)
        right = core.get("corrected", {}).get(task)
        rows.append(
            [
                f"{name}\\* (from {plain(stand_in)})" if stand_in else name,
                f"{core['n'][task]:,}" if "n" in core else DASH,
                plus_minus(accuracy, core.get("stderr", {}).get(task)),
                DASH if right is None else f"{right:.3f}",
                f"{core['centered'][task]:.3f}",
            ]
        )
    rows += [[f"{plain(task)}: no data", *[DASH] * 4] for task in core["missing"]]
    head = ["task", "examples", "accuracy", "by the right answers", "centred"]
    if not core.get("corrected"):
        head.pop(3)
        rows = [r[:3] + r[4:] for r in rows]
    return table(head, rows)


def chat(facts: Facts) -> str:
    """Subjects of the tasks that have some, and pass@k."""
    blocks = [_subjects(facts, task) for task in facts.tasks()]
    blocks = list(filter(None, [_pass_at_k(facts), *blocks]))
    return "\n\n".join(["## More of the chat tasks", *blocks]) if blocks else ""


def _subjects(facts: Facts, task: str) -> str:
    stages = [s for s in STAGES if facts.chat(s).get(task, {}).get("subjects")]
    if not stages:
        return ""
    by_stage = {s: facts.chat(s)[task]["subjects"] for s in stages}
    last, latest = stages[-1], by_stage[stages[-1]]
    path = facts.dir / "report" / f"{task}_subjects.png"
    chart = [
        Bar(n.replace("_", " "), latest[n]["accuracy"], latest[n]["stderr"])
        for n in sorted(latest, key=lambda n: latest[n]["accuracy"])
    ]
    chance, title = facts.chat(last)[task]["baseline"], titled(task)
    whole = (facts.chat(last)[task]["accuracy"], "all questions")
    bars(path, f"{title} of {last}, by subject", "accuracy", chart, zero=(chance, "chance"), mean=whole)
    names = sorted({n for found in by_stage.values() for n in found})
    rows = []
    for name in names:
        cells = [found.get(name) for found in by_stage.values()]
        asked = max(c["n"] for c in cells if c)
        shown = [plus_minus(c["accuracy"], c["stderr"]) if c else DASH for c in cells]
        rows.append([plain(name.replace("_", " ")), f"{asked:,}", *shown])
    macro = [facts.chat(s)[task]["macro"] for s in stages]
    rows.append(["**mean of the subjects**", "", *(plus_minus(m["accuracy"], m["stderr"]) for m in macro)])
    body = f"![{title} by subject](report/{path.name})\n\n" + table(["", "questions", *map(str.upper, stages)], rows)
    return fold(f"{title} by subject", body)


def _pass_at_k(facts: Facts) -> str:
    stages = [s for s in STAGES if any("pass_at_k" in t for t in facts.chat(s).values())]
    rows, drawn = [], set()
    for task in facts.tasks():
        found = {s: facts.chat(s).get(task, {}) for s in stages}
        names = dict.fromkeys(k for t in found.values() for k in t.get("pass_at_k", {}))
        drawn |= {(t["samples"], t["temperature"]) for t in found.values() if "pass_at_k" in t}
        for name in sorted(names, key=lambda k: int(k.split("@")[1])):
            cells = [found[s].get("pass_at_k", {}).get(name) for s in stages]
            shown = [plus_minus(c["value"], c["stderr"]) if c else DASH for c in cells]
            rows.append([f"{titled(task)} {name}", *shown])
    if not rows:
        return ""
    how = "; ".join(f"{n} answers to a question, at temperature {t:g}" for n, t in sorted(drawn))
    return f"{table(['', *map(str.upper, stages)], rows)}\n\npass@k: the chance that one of k answers is right; {how}."
