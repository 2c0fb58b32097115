"""Two runs, or two stages of one: which differences of their scores are more than noise.

Where both answered the same questions, the test is a paired one: McNemar's exact test for verdicts, on the questions
that only one of them has right, and a paired t-test for bits per byte and pass@k. Elsewhere a figure is compared by its
standard error. p-values are corrected by Holm's method, over the headline figures (bpb, CORE, ChatCORE) and over tasks.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from evals import records
from evals.significance import by_error, holm, mcnemar, paired, pass_at_k, two_proportions
from nanochat_jax.errors import UserError

ALPHA = 0.05
HEADLINES = {"bpb": "rows", "core": "tasks", "chatcore": "tasks"}  # figure -> what its n counts
TABLE_WIDTH = 104
IN_COMMON = 0.5  # of the smaller one's questions: from there on the comparison is of these, question by question
VERDICTS = {"a": "[bold red]A better", "b": "[bold green]B better", None: "[dim]noise"}


@dataclass(frozen=True)
class Side:
    """A stage of a run, and what its evaluation left."""

    run: Path
    stage: str
    result: dict

    def __str__(self):
        return f"{self.run}:{self.stage}"

    def records(self, task: str) -> dict[tuple, dict]:
        """{(index, id of what was shown): record} of a task; {} where there is none."""
        return {(r["index"], r.get("id")): r for r in records.read(records.path_of(self.run, self.stage, task))}


@dataclass(frozen=True)
class Difference:
    """Of one figure: a, b and b - a with its standard error; p of a test that there is none.

    n: questions, (a's, b's) where they are not the same ones. only: (a, b), how many only one of them has right.
    """

    name: str
    test: str
    n: int | tuple[int, int]
    a: float
    b: float
    stderr: float
    p: float
    only: tuple[int, int] | None = None
    p_holm: float = math.nan

    @property
    def headline(self) -> bool:
        return self.name in HEADLINES

    @property
    def task(self) -> str:
        """gsm8k of "gsm8k pass@1"."""
        return self.name.split()[0]

    @property
    def difference(self) -> float:
        return self.b - self.a

    def better(self, alpha: float) -> str | None:
        """a or b, where that is sure."""
        if self.p_holm >= alpha or not self.difference:
            return None
        return "b" if (self.difference > 0) != (self.name == "bpb") else "a"  # less of bpb is better


def compare(a: Side, b: Side, tasks: Sequence[str] | None = None) -> list[Difference]:
    """All figures that both have, headlines first, with corrected p. UserError where there are none, or not all."""
    bpb, core, chatcore = ([side.result.get(name) or {} for side in (a, b)] for name in HEADLINES)
    chat = {name: _verdicts(name, a, b) for name in a.result["chat"] if name in b.result["chat"]}
    errors = {name: d.stderr / (1 - a.result["chat"][name]["baseline"]) for name, d in chat.items()}
    found = [*_bpb(a, b, *bpb), *_core(*core), *_chatcore(errors, *chatcore), *chat.values()]
    found += [d for name in chat for d in _pass_at_k(name, a, b)] + _core_tasks(*core)
    if tasks is not None:
        if unknown := [t for t in tasks if t not in {name for d in found for name in (d.name, d.task)}]:
            there = ", ".join(dict.fromkeys(d.task for d in found)) or "nothing"
            raise UserError(f"{a} and {b} do not both have {', '.join(unknown)}; they share {there}")
        found = [d for d in found if d.task in tasks or d.name in tasks]
    if not found:
        raise UserError(f"{a} and {b} have no figure in common; evaluate both on the same tasks with python -m evals")
    groups = ([d for d in found if d.headline], [d for d in found if not d.headline])
    return [replace(d, p_holm=p) for group in groups for d, p in zip(group, holm([d.p for d in group]))]


def _in_pairs(task: str, a: Side, b: Side, value: Callable[[dict], Any]) -> list[np.ndarray]:
    """Each side's values on the questions that both were asked, in one order; [] where these are too few of all."""
    found = [side.records(task) for side in (a, b)]
    both = [key for key in found[0] if key in found[1]]
    if not both or len(both) < IN_COMMON * min(map(len, found)):
        return []
    return [np.array([value(side[key]) for key in both]) for side in found]


def _by_pairs(name: str, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> Difference:
    """The means of two figures of the same questions (n,), or their sums over the sum of weights."""
    stderr, p = paired(a, b, weights)
    whole = len(a) if weights is None else weights.sum()
    return Difference(name, "paired t", len(a), float(a.sum() / whole), float(b.sum() / whole), stderr, p)


def _by_errors(name: str, n, a: float, b: float, *stderrs: float) -> Difference:
    stderr = math.hypot(*stderrs)
    return Difference(name, "standard errors", n, a, b, stderr, by_error(b - a, stderr))


def _by_shares(name: str, a: tuple[float, int], b: tuple[float, int]) -> Difference:
    """Two accuracies (accuracy, n) on different questions."""
    stderr, p = two_proportions(*a, *b)
    return Difference(name, "two proportions", (a[1], b[1]), a[0], b[0], stderr, p)


def _verdicts(task: str, a: Side, b: Side) -> Difference:
    if not (right := _in_pairs(task, a, b, lambda r: r["correct"])):
        one, other = (side.result["chat"][task] for side in (a, b))
        return _by_shares(task, (one["accuracy"], one["n"]), (other["accuracy"], other["n"]))
    n, (right_a, right_b) = len(right[0]), right
    only_a, only_b = only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    stderr = math.sqrt(only_a + only_b - (only_b - only_a) ** 2 / n) / n
    return Difference(task, "McNemar", n, float(right_a.mean()), float(right_b.mean()), stderr, mcnemar(*only), only)


def _pass_at_k(task: str, a: Side, b: Side) -> list[Difference]:
    """pass@1 and pass@k, for the largest k that both have samples for."""
    results = [side.result["chat"][task] for side in (a, b)]
    one, other = (result.get("pass_at_k", {}) for result in results)
    ks = sorted(int(name.split("@")[1]) for name in one if name in other)
    right = _in_pairs(task, a, b, lambda r: [s["correct"] for s in r["samples"]]) if ks else []
    out = []
    for k in dict.fromkeys(ks[:1] + ks[-1:]):
        if right:
            out.append(_by_pairs(f"{task} pass@{k}", *(pass_at_k(side, k) for side in right)))
        else:
            x, y, n = one[f"pass@{k}"], other[f"pass@{k}"], tuple(result["n"] for result in results)
            out.append(_by_errors(f"{task} pass@{k}", n, x["value"], y["value"], x["stderr"], y["stderr"]))
    return out


def _bpb(a: Side, b: Side, one: dict, other: dict) -> list[Difference]:
    """Bits per byte: of the same rows where the tokenizers and the text are the same."""
    if one.get("stderr") is None or other.get("stderr") is None:
        return []
    rows = _in_pairs("bpb", a, b, lambda r: (r["bits"], r["bytes"]))
    if rows and len(rows[0]) > 1:
        return [_by_pairs("bpb", rows[0][:, 0], rows[1][:, 0], rows[0][:, 1])]
    n = one["rows"], other["rows"]
    return [_by_errors("bpb", n, one["bpb"], other["bpb"], one["stderr"], other["stderr"])]


def _core_tasks(one: dict, other: dict) -> list[Difference]:
    both = [name for name in one.get("results", {}) if name in other.get("results", {})]
    same = [name for name in both if one["substitutes"].get(name) == other["substitutes"].get(name)]
    return [_by_shares(f"core {x}", *((core["results"][x], core["n"][x]) for core in (one, other))) for x in same]


def _core(one: dict, other: dict) -> list[Difference]:
    if not one.get("results") or any(set(one[k]) != set(other.get(k, ())) for k in ("results", "substitutes")):
        return []
    figures = (core[k] for k in ("core_metric", "core_stderr") for core in (one, other))
    return [_by_errors("core", one["n_tasks"], *figures)]


def _chatcore(errors: dict[str, float], one: dict, other: dict) -> list[Difference]:
    """ChatCORE, where both are of the same tasks. errors: of the differences of the tasks' centred accuracies."""
    if one.get("score") is None or sorted(one["tasks"]) != sorted(other.get("tasks", ())):
        return []
    n = len(one["tasks"])
    return [_by_errors("chatcore", n, one["score"], other["score"], *(errors[t] / n for t in one["tasks"]))]


def open_sides(specs: Sequence[str], stage: str | None) -> list[Side]:
    """The two sides, of the named stages; where none is named of the latest that both runs have. UserError."""
    named = [records.split_spec(spec) for spec in specs]
    found = [records.results(run) for run, _ in named]
    default = stage or named[0][1] or named[1][1]
    if default is None:
        both = [s for s in found[0] if s in found[1]]
        if not both:
            has = "; ".join(f"{run} has {', '.join(f)}" for (run, _), f in zip(named, found))
            raise UserError(f"no stage of both runs has been evaluated: {has}")
        default = both[-1]
    stages = [records.check_stage(run, f, own or default) for (run, own), f in zip(named, found)]
    a, b = sides = [Side(run, s, f[s]) for (run, _), s, f in zip(named, stages, found)]
    if (a.run.resolve(), a.stage) == (b.run.resolve(), b.stage):
        raise UserError(f"{a} and {b} are the same; name another run, or a stage with each: {a.run}:sft {a.run}:rl")
    return sides


def table(found: Sequence[Difference], alpha: float) -> Table:
    numbers = [Column(h, justify="right", no_wrap=True) for h in ("A", "B", "B - A", "n", "only A, B", "Holm's p")]
    out = Table(Column("", no_wrap=True), *numbers, Column("", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for d in found:
        digits = 4 if d.headline else 3
        figures = [f"{d.a:.{digits}f}", f"{d.b:.{digits}f}", f"{d.difference:+.{digits}f} ± {d.stderr:.{digits}f}"]
        n = "/".join(f"{n:,}" for n in (d.n if isinstance(d.n, tuple) else (d.n,)))
        n += f" {HEADLINES[d.name]}" if d.headline else ""
        only = f"{d.only[0]:,}, {d.only[1]:,}" if d.only else ""
        p = "< 0.001" if d.p_holm < 0.001 else f"{d.p_holm:.3f}"
        out.add_row(d.name, *figures, n, only, p, VERDICTS[d.better(alpha)])
    return out


def legend(found: Sequence[Difference], alpha: float) -> str:
    heads = sum(d.headline for d in found)
    parts = [f"{n} {what}" for n, what in ((heads, "headline figures"), (len(found) - heads, "others")) if n]
    text = f"± one standard error. Noise: p, corrected for {' and '.join(parts)}, is {alpha:g} or more."
    if any(d.only for d in found):
        text += " only A, B: questions that one alone has right."
    if any(isinstance(d.n, tuple) for d in found):
        text += " n of both: they were not asked the same."
    return text


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m evals compare", description=__doc__.split("\n\n")[0])
    p.add_argument("runs", nargs=2, metavar="RUN", help="a run directory, or RUN:STAGE")
    p.add_argument("--stage", help="of both, where none is named with them; default: the latest that both have")
    p.add_argument("--tasks", help="a comma-separated choice of chat tasks, bpb, core, chatcore; default: all")
    p.add_argument("--alpha", type=float, default=ALPHA, help=f"the chance of a false alarm; default {ALPHA}")
    args = p.parse_args(argv)
    if not 0 < args.alpha < 1:
        p.error("--alpha must lie between 0 and 1")
    a, b = open_sides(args.runs, args.stage)
    found = compare(a, b, [t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else None)
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # figures are never cut
    console.print(Text.assemble(("A", "bold"), f" {a}\n", ("B", "bold"), f" {b}"))
    console.print(table(found, args.alpha))
    console.print(Text(legend(found, args.alpha), "dim"))
    figures = [_as_json(d, args.alpha) for d in found]
    print(json.dumps({"a": str(a), "b": str(b), "alpha": args.alpha, "figures": figures}))
    return 0


def _as_json(d: Difference, alpha: float) -> dict:
    figures = {k: v for k, v in asdict(d).items() if v is not None} | {"difference": d.difference}
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
    return rounded | {"better": d.better(alpha)}
