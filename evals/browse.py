"""What a model was asked and what it answered, to be read in the terminal."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from evals import records
from nanochat_jax.errors import UserError
from nanochat_jax.words import printable

SHOWN = 10  # questions, unless told otherwise
PLAIN_WIDTH = 120  # of what goes to a file or a pipe


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m evals show",
        description="Questions, answers and verdicts of an evaluation. Without --task: what there is to read.",
    )
    p.add_argument("run", metavar="RUN", help="a run directory, or RUN:STAGE")
    p.add_argument("--task", help="gsm8k, for example")
    p.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has answers to the task")
    verdict = p.add_mutually_exclusive_group()
    verdict.add_argument("--wrong", action="store_true", help="only where the answer is wrong")
    verdict.add_argument("--right", action="store_true", help="only where it is right")
    p.add_argument("--index", type=int, metavar="N", help="only the question of this index in the task")
    p.add_argument("--grep", metavar="TEXT", help="only where this regular expression, in any case, is found")
    p.add_argument("--limit", type=int, default=SHOWN, metavar="N", help=f"at most so many, 0 for all; default {SHOWN}")
    args = p.parse_args(argv)
    run, stage = records.split_spec(args.run)
    stage = args.stage or stage
    found = records.results(run)
    stages = [records.check_stage(run, found, stage)] if stage else list(found)
    tasks = {s: records.tasks_of(run, s) for s in stages}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if args.task is None:
        console.print(overview(run, tasks))
        return 0
    having = [s for s in stages if args.task in tasks[s]]
    if not having:
        there = ", ".join(dict.fromkeys(t for s in reversed(stages) for t in tasks[s])) or "none"
        of = f"stage {stage} of {run}" if stage else run
        raise UserError(f"{of} has no answers to {args.task}; there are {there}")
    asked = records.read(records.path_of(run, having[-1], args.task))
    chosen = choose(asked, args)
    shown = chosen[: args.limit or None]
    for record in shown:
        show(console, record)
    right = sum(r["correct"] for r in asked)
    line = f"{run} {having[-1]} {args.task}: {right} of {len(asked)} right; {len(shown)} of {len(chosen)} chosen shown"
    console.print(Text(line + ("" if len(shown) == len(chosen) else " (--limit 0 shows all)"), "bold"), soft_wrap=True)
    return 0


def overview(run: Path, tasks: dict[str, list[str]]) -> Table:
    table = Table("stage", "task", *(Column(h, justify="right") for h in ("questions", "right", "wrong")), box=None)
    for stage, task in ((stage, task) for stage, names in tasks.items() for task in names):
        correct = [r["correct"] for r in records.read(records.path_of(run, stage, task))]
        table.add_row(stage, task, *map(str, (len(correct), sum(correct), len(correct) - sum(correct))))
    if not table.row_count:
        raise UserError(f"{run} has no answers to read; python -m evals --run-dir {run} --tasks NAME makes them")
    return table


def choose(found: Sequence[dict], args: argparse.Namespace) -> list[dict]:
    """The records that the options ask for. UserError where there is none."""
    indices = [r["index"] for r in found]
    if args.index is not None and args.index not in indices:
        span = f"between {min(indices)} and {max(indices)}"
        raise UserError(f"question {args.index} was not asked; {len(found)} were, {span}")
    try:
        pattern = re.compile(args.grep or "", re.IGNORECASE)
    except re.error as e:
        raise UserError(f"--grep {args.grep} is no regular expression: {e}") from None

    def is_asked_for(r: dict) -> bool:
        if (args.wrong and r["correct"]) or (args.right and not r["correct"]) or args.index not in (None, r["index"]):
            return False
        return any(map(pattern.search, [r["prompt"], *(records.said(a) for a in (r, *r.get("samples", ())))]))

    if not (chosen := list(filter(is_asked_for, found))):
        raise UserError("no question is as the options say")
    return chosen


def show(console: Console, record: dict) -> None:
    subject = record.get("subject", "").replace("_", " ")
    console.rule(Text.assemble((f" {record['index']} ", "reverse"), f" {subject} " if subject else ""), align="left")
    console.print(Text(printable(record["prompt"].strip())))
    _show_answer(console, "answer", record)
    alike: dict[tuple, list[int]] = {}  # samples that say the same are shown once
    samples = record.get("samples", ())
    for i, sample in enumerate(samples):
        alike.setdefault((records.said(sample), sample["correct"]), []).append(i)
    for places in alike.values():
        name = f"sample{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
        _show_answer(console, name, samples[places[0]])
    if record.get("expected") is not None and not record["correct"]:
        console.print(Text.assemble(("\nexpected\n", "bold yellow"), printable(record["expected"].strip())))
    console.print()


def _show_answer(console: Console, name: str, answer: dict) -> None:
    verdict, style = ("right", "green") if answer["correct"] else ("wrong", "red")
    notes = ", ".join([verdict, *records.remarks(answer)])
    console.print(Text.assemble("\n", (name, "bold"), ": ", (printable(notes), style)))
    console.print(Text(printable(records.said(answer).strip()) or "(nothing)"))
