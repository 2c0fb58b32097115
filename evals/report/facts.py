"""What a run directory says, read once: settings, done marks, metrics, evaluations, answers."""

from pathlib import Path

from nanochat_jax.config import read_run_config
from nanochat_jax.files import read_json
from nanochat_jax.rules import STAGES
from nanochat_jax.tracking.tracking import read_records, system_info
from nanochat_jax.words import listed, plain

TITLES = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spellingbee": "SpellingBee",
}


def titled(task: str) -> str:
    return TITLES.get(task, task)


def names(tasks: list[str]) -> str:
    """Names of tasks, which come from outside, as words of a sentence."""
    return listed([plain(task) for task in tasks])


def stand_ins(core: dict) -> str:
    """Files that stand in for the data of tasks of CORE, with these tasks."""
    tasks: dict[str, list[str]] = {}
    for task, path in core.get("substitutes", {}).items():
        tasks.setdefault(path, []).append(task)
    return ", ".join(f"{plain(path)} for {names(of)}" for path, of in tasks.items())


def is_in_part(task: dict) -> bool:
    return task["n"] < task.get("of", task["n"])


class Facts:
    """What is not there yet is empty. UserError where `run_dir` is not a run directory.

    done, metrics: also of the tokenizer and the evaluation. chat: {stage: {task: scores}}; core: {stage: scores}.
    """

    def __init__(self, run_dir: Path):
        self.dir = run_dir
        self.config = read_run_config(run_dir)
        parts = ("tokenizer", *STAGES, "eval")
        self.done: dict[str, dict] = {p: read_json(run_dir / p / "done.json") or {} for p in parts}
        self.metrics = {p: read_records(run_dir / p / "metrics.jsonl") for p in parts}
        self.evals: dict[str, dict] = {s: read_json(run_dir / "evals" / f"{s}.json") or {} for s in STAGES}
        self.ended = [s for s in STAGES if self.done[s]]
        self.evaluated = [s for s in STAGES if self.evals[s]]
        self.chat: dict[str, dict[str, dict]] = {s: self.evals[s].get("chat") or {} for s in STAGES}
        self.core: dict[str, dict] = {s: c for s in STAGES if (c := self.evals[s].get("core")) and c["results"]}
        self.seconds = sum(mark["seconds"] for mark in self.done.values() if mark)
        self.system_noted = next((m["system"] for s in STAGES if "system" in (m := self.done[s])), None)
        self.system: dict = self.system_noted or system_info()  # of the stages, or else of this process

    @property
    def tasks(self) -> list[str]:
        """The chat tasks that were asked: those of ChatCORE first, then in the order of the evaluations."""
        asked = dict.fromkeys(name for s in STAGES for name in self.chat[s])
        return [n for n in TITLES if n in asked] + [n for n in asked if n not in TITLES]

    def asked_in_part(self) -> str:
        """A remark on the tasks of which some stage was not asked all questions; "" where there is none."""
        out = []
        for task in self.tasks:
            found = [r for s in STAGES if (r := self.chat[s].get(task)) and is_in_part(r)]
            if found:
                asked = " or ".join(f"{n:,}" for n in sorted({r["n"] for r in found}))
                out.append(f"{titled(task)} ({asked} of {found[0]['of']:,})")
        return f"Not all questions were asked of {listed(out)}." if out else ""
