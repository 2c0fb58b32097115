"""Two runs, or two stages of one: which differences of their scores are more than noise.

    python -m evals compare runs/a runs/b --stage sft
    python -m evals compare runs/demo:sft runs/demo:rl --tasks gsm8k,bpb

Where both answered the same questions each is compared with itself: McNemar's exact test for verdicts, on the questions
that only one of them has right, and a paired t-test for bits per byte and pass@k. Elsewhere a figure is compared by its
standard error, which needs larger differences to be sure. With many comparisons some look sure by chance: p-values are
corrected by Holm's method, over the headline figures (bpb, CORE, ChatCORE) and over the tasks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from evals import records
from evals.passk import pass_at_k
from evals.significance import by_error, holm, mcnemar, paired, two_proportions
from nanochat_jax.errors import UserError

ALPHA = 0.05
TABLE_WIDTH = 104
STYLES = {"a": "bold red", "b": "bold green"}
IN_COMMON = 0.5  # of the smaller one's questions: from there on the comparison is of these, question by question


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
        found = records.read(records.path_of(self.run, self.stage, task)) or []
        return {(r["index"], r.get("id")): r for r in found}


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
    headline: bool = False
    less_is_better: bool = False
    p_holm: float = math.nan

    @property
    def difference(self) -> float:
        return self.b - self.a

    def better(self, alpha: float) -> str | None:
        """a or b, where that is sure."""
        if self.p_holm >= alpha or not self.difference:
            return None
        return "b" if (self.difference > 0) != self.less_is_better else "a"


# ------------------------------------------------------------------------------------------------- comparisons


def compare(a: Side, b: Side, tasks: Sequence[str] | None = None) -> list[Difference]:
    """All figures that both have, headlines first, with corrected p. UserError where there are none, or not all."""
    chat = {name: verdicts(name, a, b) for name in a.result["chat"] if name in b.result["chat"]}
    answers = [d for name in chat for d in pass_differences(name, a, b)]
    core = core_tasks(a, b)
    figures = [*chat.values(), *answers, *core.values()]
    heads = [d for d in (bpb(a, b), core_metric(a, b), chatcore(a, b, chat)) if d]
    if tasks is not None:
        known = {*(d.name for d in (*heads, *figures)), *(["core"] if core else [])}
        unknown = [t for t in tasks if t not in known]
        if unknown:
            there = ", ".join(dict.fromkeys(d.name.split()[0] for d in (*heads, *figures))) or "nothing"
            raise UserError(f"{a} and {b} do not both have {', '.join(unknown)}; they share {there}")
        heads, figures = (
            [d for d in group if d.name.split()[0] in tasks or d.name in tasks] for group in (heads, figures)
        )
    if not heads and not figures:
        raise UserError(f"{a} and {b} have no figure in common; evaluate both on the same tasks with python -m evals")
    return [replace(d, p_holm=p) for group in (heads, figures) for d, p in zip(group, holm([d.p for d in group]))]


def _paired(a: Side, b: Side, task: str) -> list[tuple[dict, dict]]:
    """The records of questions that both were asked; [] where these are too few of all."""
    of_a, of_b = a.records(task), b.records(task)
    both = [key for key in of_a if key in of_b]
    enough = both and len(both) >= IN_COMMON * min(len(of_a), len(of_b))
    return [(of_a[key], of_b[key]) for key in both] if enough else []


def verdicts(task: str, a: Side, b: Side) -> Difference:
    """The accuracy of a chat task."""
    pairs = _paired(a, b, task)
    if not pairs:
        one, other = a.result["chat"][task], b.result["chat"][task]
        return _apart(task, (one["accuracy"], one["n"]), (other["accuracy"], other["n"]))
    return _by_verdicts(task, [(x["correct"], y["correct"]) for x, y in pairs])


def _apart(name: str, a: tuple[float, int], b: tuple[float, int]) -> Difference:
    """Of two shares (accuracy, n) of questions that are not the same."""
    stderr, p = two_proportions(*a, *b)
    return Difference(name, "two proportions", (a[1], b[1]), a[0], b[0], stderr, p)


def _by_verdicts(name: str, pairs: Sequence[tuple[bool, bool]]) -> Difference:
    n = len(pairs)
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    stderr = math.sqrt(only_a + only_b - (only_b - only_a) ** 2 / n) / n
    right_a, right_b = (sum(side) / n for side in zip(*pairs))
    return Difference(name, "McNemar", n, right_a, right_b, stderr, mcnemar(only_a, only_b), (only_a, only_b))


def pass_differences(task: str, a: Side, b: Side) -> list[Difference]:
    """pass@1 and pass@k, for the largest k that both have samples for."""
    one, other = (side.result["chat"][task].get("pass_at_k", {}) for side in (a, b))
    ks = sorted(int(name.split("@")[1]) for name in one if name in other)
    pairs = _paired(a, b, task) if ks else []
    out = []
    for k in dict.fromkeys((ks[0], ks[-1]) if ks else ()):
        name = f"{task} pass@{k}"
        if pairs:
            chances = [pass_at_k(_right(side), k) for side in zip(*pairs)]
            out.append(_by_pairs(name, *chances))
        else:
            x, y = one[f"pass@{k}"], other[f"pass@{k}"]
            n = a.result["chat"][task]["n"], b.result["chat"][task]["n"]
            out.append(_by_errors(name, n, (x["value"], x["stderr"]), (y["value"], y["stderr"])))
    return out


def _right(found: Sequence[dict]) -> np.ndarray:
    """(Q, samples) verdicts on the samples of records."""
    return np.array([[s["correct"] for s in r["samples"]] for r in found])


def _by_pairs(name: str, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None, **more) -> Difference:
    """The means of two figures of the same questions (n,), or their sums over the sum of weights."""
    stderr, p = paired(a, b, weights)
    whole = len(a) if weights is None else weights.sum()
    return Difference(name, "paired t", len(a), float(a.sum() / whole), float(b.sum() / whole), stderr, p, **more)


def _by_errors(name: str, n, a: tuple[float, float], b: tuple[float, float], **more) -> Difference:
    """Two figures (value, standard error) that have nothing in common."""
    stderr = math.hypot(a[1], b[1])
    return Difference(name, "standard errors", n, a[0], b[0], stderr, by_error(b[0] - a[0], stderr), **more)


def bpb(a: Side, b: Side) -> Difference | None:
    """Bits per byte: of the same rows where the tokenizers and the text are the same."""
    one, other = a.result.get("bpb"), b.result.get("bpb")
    if not one or not other or one.get("stderr") is None or other.get("stderr") is None:
        return None
    how = {"headline": True, "less_is_better": True}
    pairs = _paired(a, b, "bpb")
    if len(pairs) < 2:
        n = one["rows"], other["rows"]
        return _by_errors("bpb", n, (one["bpb"], one["stderr"]), (other["bpb"], other["stderr"]), **how)
    bits_a, bits_b = (np.array([r["bits"] for r in side]) for side in zip(*pairs))
    return _by_pairs("bpb", bits_a, bits_b, np.array([r["bytes"] for r, _ in pairs]), **how)


def core_tasks(a: Side, b: Side) -> dict[str, Difference]:
    """The tasks of CORE that both have with the same data."""
    one, other = a.result.get("core") or {}, b.result.get("core") or {}
    out = {}
    for name in one.get("results", {}):
        if name in other.get("results", {}) and one["substitutes"].get(name) == other["substitutes"].get(name):
            shares = ((core["results"][name], core["n"][name]) for core in (one, other))
            out[name] = _apart(f"core {name}", *shares)
    return out


def core_metric(a: Side, b: Side) -> Difference | None:
    """CORE, where both are of the same tasks."""
    one, other = a.result.get("core") or {}, b.result.get("core") or {}
    same = ("results", "substitutes")
    if not one.get("results") or not other or any(set(one[k]) != set(other.get(k, ())) for k in same):
        return None
    figures = ((core["core_metric"], core["core_stderr"]) for core in (one, other))
    return _by_errors("core", one["n_tasks"], *figures, headline=True)


def chatcore(a: Side, b: Side, chat: dict[str, Difference]) -> Difference | None:
    """ChatCORE, where both are of the same tasks; its error is made of those of the tasks' differences."""
    one, other = a.result.get("chatcore"), b.result.get("chatcore")
    if not one or not other or one["score"] is None or sorted(one["tasks"]) != sorted(other["tasks"]):
        return None
    scale = {task: 1 - a.result["chat"][task]["baseline"] for task in one["tasks"]}
    stderr = math.sqrt(sum((chat[task].stderr / scale[task]) ** 2 for task in scale)) / len(scale)
    p = by_error(other["score"] - one["score"], stderr)
    return Difference("chatcore", "standard errors", len(scale), one["score"], other["score"], stderr, p, headline=True)


# ------------------------------------------------------------------------------------------------------ the command


def open_sides(specs: Sequence[str], stage: str | None) -> tuple[Side, Side]:
    """The two sides, of the named stages; where none is named of the latest that both runs have. UserError."""
    named = [records.split_spec(spec) for spec in specs]
    found = [records.results(run) for run, _ in named]
    chosen = [own or stage for _, own in named]
    if not any(chosen):
        both = [s for s in found[0] if s in found[1]]
        if not both:
            has = "; ".join(f"{run} has {', '.join(f)}" for (run, _), f in zip(named, found))
            raise UserError(f"no stage of both runs has been evaluated: {has}")
        chosen = [both[-1]] * 2
    chosen = [mine or other for mine, other in zip(chosen, chosen[::-1])]
    stages = [records.stage_of(run, f, s) for (run, _), f, s in zip(named, found, chosen)]
    a, b = (Side(run, s, f[s]) for (run, _), s, f in zip(named, stages, found))
    if (a.run.resolve(), a.stage) == (b.run.resolve(), b.stage):
        raise UserError(f"{a} and {b} are the same; name another run, or a stage with each: {a.run}:sft {a.run}:rl")
    return a, b


def table(found: Sequence[Difference], alpha: float) -> Table:
    numbers = [Column(h, justify="right", no_wrap=True) for h in ("A", "B", "B - A", "n", "only A, B", "Holm's p")]
    out = Table(Column("", no_wrap=True), *numbers, Column("", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for d in found:
        better, digits = d.better(alpha), 4 if d.headline else 3
        only = f"{d.only[0]:,}, {d.only[1]:,}" if d.only else ""
        figures = [f"{d.a:.{digits}f}", f"{d.b:.{digits}f}", f"{d.difference:+.{digits}f} ± {d.stderr:.{digits}f}"]
        verdict = Text(f"{better.upper()} better", STYLES[better]) if better else Text("noise", "dim")
        p = "< 0.001" if d.p_holm < 0.001 else f"{d.p_holm:.3f}"
        out.add_row(d.name, *figures, _count(d), only, p, verdict)
    return out


def _count(d: Difference) -> str:
    """What stands in the column n."""
    unit = {"bpb": " rows", "core": " tasks", "chatcore": " tasks"}.get(d.name, "")
    return "/".join(f"{n:,}" for n in (d.n if isinstance(d.n, tuple) else (d.n,))) + unit


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
    print(
        json.dumps({"a": str(a), "b": str(b), "alpha": args.alpha, "figures": [_as_json(d, args.alpha) for d in found]})
    )
    return 0


def _as_json(d: Difference, alpha: float) -> dict:
    plain = {k: v for k, v in asdict(d).items() if v is not None and k not in ("headline", "less_is_better")}
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in plain.items()}
    return rounded | {"difference": float(f"{d.difference:.6g}"), "better": d.better(alpha)}
