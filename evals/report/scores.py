"""The table of scores over stages, with what is partial explained below it."""

from collections.abc import Callable
from typing import NamedTuple

from evals.report.facts import Facts, is_in_part, names, stand_ins, titled
from nanochat_jax.words import DASH, duration, listed, plain, plus_minus, table

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

    @property
    def printed(self) -> str:
        """The value without its error."""
        return self.text.split(" ± ")[0]


def section(facts: Facts) -> str:
    if not facts.evaluated:
        return "## Scores\n\nNo stage has been evaluated."
    notes: dict[str, int] = {}  # remarks and their numbers
    rows = []

    def row(title: str, chance: str, cells: list[Cell | None], best=max) -> None:
        if any(cells):
            rows.append([title, chance, *_texts(cells, best, notes)])

    evals, in_part = [facts.evals[s] for s in facts.evaluated], facts.asked_in_part()
    bpb, core = [e.get("bpb") or {} for e in evals], [facts.core.get(s, {}) for s in facts.evaluated]
    row("bits per byte (↓)", DASH, [_bpb(found) for found in bpb], best=min)
    row("CORE", "0", [_core(found) for found in core])
    for task in facts.tasks:
        asked = [facts.chat[s].get(task, {}) for s in facts.evaluated]
        chance = next(found["baseline"] for found in asked if found)
        row(titled(task), f"{chance:.2f}", [_task(found, in_part) for found in asked])
        for name in dict.fromkeys(n for found in asked for n in found.get("aspects", {})):
            aspects = [found.get("aspects", {}).get(name, {}) for found in asked]
            row(f"{titled(task)}: {name}", DASH, [_task(found, "") for found in aspects])
        row(f"{titled(task)}, lenient", f"{chance:.2f}", [_lenient(task, found, in_part) for found in asked])
    row("ChatCORE", "0", [_chatcore(e, in_part) for e in evals])
    head = ["", "chance", *map(str.upper, facts.evaluated)]
    remarks = "\n".join(f"{number}. {text}" for text, number in notes.items())
    price, seconds = facts.config.price_per_hour, facts.seconds
    cost = "" if price is None else f", ${price * seconds / 3600:,.2f}"
    took = f"**Total wall-clock: {duration(seconds)}{cost}**, for training and evaluation." if seconds else ""
    return "\n\n".join(filter(None, ["## Scores", table(head, rows), remarks, took, LEGEND]))


def _texts(row: list[Cell | None], best: Callable, notes: dict[str, int]) -> list[str]:
    """Bold where it is the best as it is printed, if the cells can be compared and not all are alike."""
    cells = [cell for cell in row if cell]
    top = best(cells, key=lambda cell: cell.value).printed
    comparable = len({cell.over for cell in cells}) == 1 < len({cell.printed for cell in cells})
    out = []
    for cell in row:
        text, remarks = (cell.text, cell.notes) if cell else (DASH, ())
        numbers = ", ".join(str(notes.setdefault(remark, len(notes) + 1)) for remark in remarks)
        text = f"**{text}**" if cell and comparable and cell.printed == top else text
        out.append(f"{text} <sup>{numbers}</sup>" if numbers else text)
    return out


def _bpb(bpb: dict) -> Cell | None:
    value = bpb.get("bpb")
    return None if value is None else Cell(value, plus_minus(value, bpb.get("stderr"), 4))


def _core(core: dict) -> Cell | None:
    if (value := core.get("core_metric")) is None:
        return None
    said = []
    if core["missing"]:
        said.append(f"without {names(core['missing'])}, whose data are missing")
    if found := stand_ins(core):
        said.append(f"stand-ins for data: {found}")
    if core.get("max_per_task"):
        said.append(f"at most {core['max_per_task']:,} examples a task")
    kind = "Partial CORE" if core["partial"] else "CORE"
    over = f"{core['n_tasks']} of {core['total_tasks']} tasks and {sum(core.get('n', {}).values()):,} examples"
    notes = (f"{kind}: over {over}; {'; '.join(said)}.",) if said else ()
    return Cell(value, plus_minus(value, core.get("core_stderr"), 4), notes, tuple(sorted(core["results"])))


def _task(task: dict, in_part: str) -> Cell | None:
    """in_part: the remark on tasks of which not all questions were asked."""
    if not task:
        return None
    notes = (in_part,) * bool(in_part and is_in_part(task))
    return Cell(task["accuracy"], plus_minus(task["accuracy"], task.get("stderr")), notes)


def _lenient(name: str, task: dict, in_part: str) -> Cell | None:
    """Of the lenient score, where the task `name` has one beside the strict one."""
    if (value := task.get("accuracy_lenient")) is None:
        return None
    note = f"The lenient score of {titled(name)} also takes {plain(task['lenient'])}; ChatCORE is of the strict one."
    return Cell(value, plus_minus(value, task["stderr_lenient"]), (note, *(in_part,) * is_in_part(task)))


def _chatcore(found: dict, in_part: str) -> Cell | None:
    score = found.get("chatcore")
    if not score or score["score"] is None:
        return None
    notes = [in_part] if any(is_in_part(found["chat"][task]) for task in score["tasks"]) else []
    if score["partial"]:
        over, missing = (listed([titled(n) for n in score[k]]) for k in ("tasks", "missing"))
        notes.append(f"Partial ChatCORE: over {over}, without {missing}; not to be compared with a whole one.")
    text = plus_minus(score["score"], score.get("stderr"), 4)
    return Cell(score["score"], text, tuple(notes), tuple(sorted(score["tasks"])))
