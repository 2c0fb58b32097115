"""What a model was asked and what it said, to be read in the terminal.

python -m evals show runs/demo                                   what there is to read
python -m evals show runs/demo --task gsm8k --wrong              the first questions with a wrong answer
python -m evals show runs/demo:sft --task gsm8k --index 17       one question
python -m evals show runs/demo --task humaneval --grep "def .*sort" --limit 0
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from evals import records
from nanochat_jax.errors import UserError

SHOWN = 10  # questions, unless told otherwise
PLAIN_WIDTH = 120  # of what goes to a file or a pipe
STYLES = {True: "green", False: "red"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
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
    return p.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    run, stage = records.split_spec(args.run)
    stage = args.stage or stage
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if args.task is None:
        console.print(overview(run, stage))
        return 0
    stage, found = open_task(run, stage, args.task)
    chosen = choose(found, args)
    shown = chosen[: args.limit or None]
    for record in shown:
        show(console, record)
    right = sum(r["correct"] for r in found)
    words = f"{run} {stage} {args.task}: {right} of {len(found)} right; {len(shown)} of {len(chosen)} chosen shown"
    more = "" if len(shown) == len(chosen) else " (--limit 0 shows all)"
    console.print(Text(words + more, "bold"))
    return 0


# ------------------------------------------------------------------------------------------------- choosing


def overview(run: Path, stage: str | None) -> Table:
    """The tasks with answers to read, of a stage or of all."""
    found = records.results(run)
    stages = [records.stage_of(run, found, stage)] if stage else list(found)
    table = Table("stage", "task", *(Column(h, justify="right") for h in ("questions", "right", "wrong")), box=None)
    for name in stages:
        for task in records.tasks_of(run, name):
            right = Counter(r["correct"] for r in records.read(records.path_of(run, name, task)))
            table.add_row(name, task, *map(str, (right.total(), right[True], right[False])))
    if not table.row_count:
        raise UserError(f"{run} has no answers to read; python -m evals --run-dir {run} --tasks NAME makes them")
    return table


def open_task(run: Path, stage: str | None, task: str) -> tuple[str, list[dict]]:
    """(stage, records) of a task; of the latest stage that has some, where none is named. UserError."""
    found = records.results(run)
    stages = [records.stage_of(run, found, stage)] if stage else list(found)[::-1]
    for name in stages:
        if task in records.tasks_of(run, name):
            return name, records.read(records.path_of(run, name, task))
    there = dict.fromkeys(t for name in stages for t in records.tasks_of(run, name))
    of = f"stage {stage} of {run}" if stage else run
    raise UserError(f"{of} has no answers to {task}; there are {', '.join(there) or 'none'}")


def choose(found: Sequence[dict], args: argparse.Namespace) -> list[dict]:
    """The records that the options ask for. UserError where there is none."""
    if args.index is not None and args.index not in {r["index"] for r in found}:
        raise UserError(f"question {args.index} was not asked; {len(found)} were, {_span(r['index'] for r in found)}")
    try:
        pattern = re.compile(args.grep or "", re.IGNORECASE)
    except re.error as e:
        raise UserError(f"--grep {args.grep} is no regular expression: {e}") from None
    chosen = [
        r
        for r in found
        if (args.index is None or r["index"] == args.index)
        and not (args.wrong and r["correct"])
        and not (args.right and not r["correct"])
        and any(pattern.search(text) for text in _texts(r))
    ]
    if not chosen:
        raise UserError("no question is as the options say")
    return chosen


def _span(indices: Iterable[int]) -> str:
    indices = list(indices)
    return f"between {min(indices)} and {max(indices)}"


def _texts(record: dict) -> Iterable[str]:
    """All that can be searched in a record."""
    yield record["prompt"]
    for answer in (record, *record.get("samples", ())):
        yield records.said(answer)


# -------------------------------------------------------------------------------------------------- showing


def printable(text: str) -> str:
    """What a terminal may be shown: a model can say escape sequences too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(console: Console, record: dict) -> None:
    """A question with all that was answered to it."""
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
    expected = record.get("expected")
    if expected is not None and not record["correct"]:
        console.print(Text("\nexpected", "bold yellow"))
        console.print(Text(printable(expected.strip())))
    console.print()


def _show_answer(console: Console, name: str, answer: dict) -> None:
    notes = ["right" if answer["correct"] else "wrong"]
    if "finish_reason" in answer:
        notes.append(f"{answer['tokens']} token{'s' if answer['tokens'] != 1 else ''}")
        if answer["finish_reason"] != "stop":
            notes.append({"length": "cut off at the limit"}.get(answer["finish_reason"], answer["finish_reason"]))
    if answer.get("reason"):
        notes.append(printable(answer["reason"]))
    console.print(Text.assemble("\n", (name, "bold"), ": ", (", ".join(notes), STYLES[answer["correct"]])))
    console.print(Text(printable(records.said(answer).strip()) or "(nothing)"))
