"""The table of scores over stages, with what is partial explained below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from evals.report.facts import STAGES, Facts, stand_ins, titled
from nanochat_jax.words import DASH, duration, listed, percent, plain, plus_minus, table

LEGEND = (
    "± is one standard error, left out where all answers were right, or none: its formula says nothing there. Bold is "
    "the best of a row, the least where ↓ stands; `python -m evals compare` says whether that is more than noise. CORE "
    "and ChatCORE are means of accuracies centred at chance: 0 at chance, 1 where all is right."
)


class Cell(NamedTuple):
    value: float
    text: str
    notes: tuple[str, ...] = ()
    over: tuple[str, ...] = ()  # of what it is the mean: means over different tasks cannot be compared


class Notes:
    """Numbered remarks; the same text gets the same number."""

    def __init__(self):
        self.texts: list[str] = []

    def mark(self, texts: Sequence[str]) -> str:
        self.texts += [text for text in texts if text not in self.texts]
        numbers = ", ".join(str(self.texts.index(text) + 1) for text in texts)
        return f" <sup>{numbers}</sup>" if numbers else ""

    def __str__(self):
        return "\n".join(f"{i}. {text}" for i, text in enumerate(self.texts, 1))


def section(facts: Facts) -> str:
    if not facts.evals:
        return "## Scores\n\nNo stage has been evaluated."
    stages, notes, rows = [s for s in STAGES if s in facts.evals], Notes(), []

    def row(title: str, chance: str, cell: Callable[[str], Cell | None], best=max) -> None:
        cells = {s: c for s in stages if (c := cell(s))}
        if cells:
            rows.append([title, chance, *_texts(stages, cells, best, notes)])

    row("bits per byte (↓)", DASH, lambda s: _bpb(facts.evals[s].get("bpb")), best=min)
    row("below byte frequencies", "0 %", lambda s: _below_unigram(facts.evals[s].get("bpb")))
    row("CORE", "0", lambda s: _core(facts.core(s)))
    row("CORE by the right answers", "0", lambda s: _core_corrected(facts.core(s)))
    in_part = f"Not all questions were asked of {facts.asked_in_part()}."
    for task in facts.tasks():
        chance = next(facts.chat(s)[task]["baseline"] for s in stages if task in facts.chat(s))
        row(titled(task), f"{chance:.2f}", lambda s, task=task: _task(facts.chat(s).get(task), in_part))
    row("ChatCORE", "0", lambda s: _chatcore(facts.evals[s], in_part))
    head = ["", "chance", *(s.upper() for s in stages)]
    return "\n\n".join(filter(None, ["## Scores", table(head, rows), str(notes), _took(facts), LEGEND]))


def _took(facts: Facts) -> str:
    if not facts.seconds:
        return ""
    price = facts.config.price_per_hour
    cost = "" if price is None else f", ${price * facts.seconds / 3600:,.2f}"
    return f"**Total wall-clock: {duration(facts.seconds)}{cost}**, for training and evaluation."


def _texts(stages: list[str], cells: dict[str, Cell], best, notes: Notes) -> list[str]:
    """A row; bold where it is the best as it is printed, if they can be compared and not all are alike."""
    bare = {s: c.text.split(" ± ")[0] for s, c in cells.items()}
    top = bare[best(cells, key=lambda s: cells[s].value)]
    comparable = len({c.over for c in cells.values()}) == 1 < len(set(bare.values()))
    out = []
    for stage in stages:
        cell = cells.get(stage)
        if cell is None:
            out.append(DASH)
            continue
        is_best = comparable and bare[stage] == top
        out.append((f"**{cell.text}**" if is_best else cell.text) + notes.mark(cell.notes))
    return out


def _bpb(bpb: dict | None) -> Cell | None:
    if not bpb or bpb["bpb"] is None:
        return None
    return Cell(bpb["bpb"], plus_minus(bpb["bpb"], bpb.get("stderr"), 4))


def _below_unigram(bpb: dict | None) -> Cell | None:
    if not bpb or bpb.get("below_unigram") is None:
        return None
    note = f"Less than the {bpb['byte_unigram']:.2f} bits that the frequencies of the text's bytes alone allow."
    return Cell(bpb["below_unigram"], percent(bpb["below_unigram"]), (note,))


def _core(core: dict | None) -> Cell | None:
    if not core or core["core_metric"] is None:
        return None
    said = []
    if core["missing"]:
        said.append(f"without {listed([plain(n) for n in core['missing']])}, whose data are missing")
    if found := stand_ins(core):
        said.append(f"stand-ins for data: {', '.join(found)}")
    if core.get("max_per_task"):
        said.append(f"at most {core['max_per_task']:,} examples a task")
    notes = []
    if said:
        kind = "Partial CORE" if core["partial"] else "CORE"
        over = f"{core['n_tasks']} of {core['total_tasks']} tasks and {sum(core.get('n', {}).values()):,} examples"
        notes.append(f"{kind}: over {over}; {'; '.join(said)}.")
    text = plus_minus(core["core_metric"], core.get("core_stderr"), 4)
    return Cell(core["core_metric"], text, tuple(notes), tuple(sorted(core["results"])))


def _core_corrected(core: dict | None) -> Cell | None:
    value = core and core.get("core_metric_corrected")
    if value is None:
        return None
    tasks = listed([plain(n) for n in core["corrected"]])
    note = f"The bundle states wrong answers in {tasks}; here they are put right."
    return Cell(value, f"{value:.4f}", (note,), tuple(sorted(core["results"])))


def _task(task: dict | None, in_part: str) -> Cell | None:
    """in_part: the remark on tasks of which not all questions were asked."""
    if not task:
        return None
    notes = (in_part,) if task["n"] < task.get("of", task["n"]) else ()
    return Cell(task["accuracy"], plus_minus(task["accuracy"], task.get("stderr")), notes)


def _chatcore(found: dict, in_part: str) -> Cell | None:
    score = found.get("chatcore")
    if not score or score["score"] is None:
        return None
    asked, notes = (found["chat"][task] for task in score["tasks"]), []
    if any(task["n"] < task.get("of", task["n"]) for task in asked):
        notes.append(in_part)
    if score["partial"]:
        over, missing = (listed([titled(n) for n in score[k]]) for k in ("tasks", "missing"))
        notes.append(f"Partial ChatCORE: over {over}, without {missing}; not to be compared with a whole one.")
    text = plus_minus(score["score"], score.get("stderr"), 4)
    return Cell(score["score"], text, tuple(notes), tuple(sorted(score["tasks"])))
