"""Task by task: CORE, subjects, and pass@k."""

from evals.report.facts import Facts, titled
from evals.report.plots import Bar, bars
from nanochat_jax.rules import STAGES
from nanochat_jax.words import DASH, fold, plain, plus_minus, table


def core(facts: Facts) -> str:
    blocks = []
    for stage, found in facts.core.items():
        bars(
            facts.dir / "report" / f"core_{stage}.png",
            f"CORE of {stage}, task by task" + (" (* stand-in data)" if found.get("substitutes") else ""),
            "accuracy centred at chance",
            [_core_bar(found, task) for task in sorted(found["results"], key=found["centered"].get)],
            mean=(found["core_metric"], "CORE"),
            chance=0.0,
        )
        table_ = fold("As a table", _core_table(found))
        blocks.append(f"![CORE of {stage} by task](report/core_{stage}.png)\n\n{table_}")
    return "\n\n".join(["## CORE by task", *blocks]) if blocks else ""


def _core_bar(core: dict, task: str) -> Bar:
    accuracy, centered = core["results"][task], core["centered"][task]
    # centred = (accuracy - chance) / (1 - chance), so that this is 1 / (1 - chance)
    scale = (1 - centered) / (1 - accuracy) if accuracy < 1 else 1.0
    name = task + ("*" if task in core.get("substitutes", {}) else "")
    return Bar(name, centered, scale * core.get("stderr", {}).get(task, 0.0))


def _core_table(core: dict) -> str:
    rows = []
    for task, accuracy in core["results"].items():
        name, stand_in = plain(task), core.get("substitutes", {}).get(task)
        row = [f"{name}\\* (from {plain(stand_in)})" if stand_in else name]
        row.append(f"{core['n'][task]:,}" if "n" in core else DASH)
        row.append(plus_minus(accuracy, core.get("stderr", {}).get(task)))
        rows.append([*row, f"{core['centered'][task]:.3f}"])
    head = ["task", "examples", "accuracy", "centred"]
    rows += [[f"{plain(task)}: no data", DASH, DASH, DASH] for task in core["missing"]]
    return table(head, rows)


def chat(facts: Facts) -> str:
    """Subjects of the tasks that have some, and pass@k."""
    blocks = [text for text in (_pass_at_k(facts), *(_subjects(facts, task) for task in facts.tasks)) if text]
    return "\n\n".join(["## More of the chat tasks", *blocks]) if blocks else ""


def _subjects(facts: Facts, task: str) -> str:
    by_stage = {s: found for s in STAGES if (found := facts.chat[s].get(task, {})).get("subjects")}
    if not by_stage:
        return ""
    last, latest = [*by_stage.items()][-1]
    title, path = titled(task), facts.dir / "report" / f"{task}_subjects.png"
    subjects = sorted(latest["subjects"].items(), key=lambda item: item[1]["accuracy"])
    bars(
        path,
        f"{title} of {last}, by subject",
        "accuracy",
        [Bar(name.replace("_", " "), found["accuracy"], found["stderr"]) for name, found in subjects],
        chance=latest["baseline"],
        mean=(latest["accuracy"], "all questions"),
    )
    rows, has_tokens = [], all("tokens" in found for found in latest["subjects"].values())
    for name in sorted({n for found in by_stage.values() for n in found["subjects"]}):
        cells = [found["subjects"].get(name) for found in by_stage.values()]
        asked = max(c["n"] for c in cells if c)
        length = latest["subjects"].get(name, {}).get("tokens")
        tokens = [f"{length:.1f}" if length else DASH] * has_tokens
        rows.append([plain(name.replace("_", " ")), f"{asked:,}", *map(_cell, cells), *tokens])
    means = [_cell(found["macro"]) for found in by_stage.values()]
    rows.append(["**mean of the subjects**", "", *means, *[""] * has_tokens])
    shown = table(["", "questions", *map(str.upper, by_stage), *["tokens of an answer"] * has_tokens], rows)
    return fold(f"{title} by subject", f"![{title} by subject](report/{path.name})\n\n{shown}")


def _cell(found: dict | None, value: str = "accuracy") -> str:
    return plus_minus(found[value], found["stderr"]) if found else DASH


def _pass_at_k(facts: Facts) -> str:
    stages = [s for s in STAGES if any("pass_at_k" in t for t in facts.chat[s].values())]
    rows, drawn = [], set()
    for task in facts.tasks:
        asked = [facts.chat[s].get(task, {}) for s in stages]
        drawn |= {(t["samples"], t["temperature"]) for t in asked if "pass_at_k" in t}
        found = [t.get("pass_at_k", {}) for t in asked]
        for name in sorted({k for f in found for k in f}, key=lambda k: int(k.split("@")[1])):
            rows.append([f"{titled(task)} {name}", *(_cell(f.get(name), "value") for f in found)])
    if not rows:
        return ""
    how = "; ".join(f"{n} answers to a question, at temperature {t:g}" for n, t in sorted(drawn))
    return f"{table(['', *map(str.upper, stages)], rows)}\n\npass@k: the chance that one of k answers is right; {how}."
