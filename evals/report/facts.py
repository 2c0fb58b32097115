"""What a run directory says, read once: settings, done marks, metrics, evaluations, answers."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path

import yaml

from evals import records
from nanochat_jax.config import RunConfig, from_dict
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.tracking.tracking import read_records, system_info
from nanochat_jax.words import listed, plain

STAGES = records.ORDER
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


def stand_ins(core: dict) -> list[str]:
    """Files that stand in for the data of tasks of CORE, with these tasks."""
    tasks: dict[str, list[str]] = {}
    for task, path in core.get("substitutes", {}).items():
        tasks.setdefault(path, []).append(plain(task))
    return [f"{plain(path)} for {listed(of)}" for path, of in tasks.items()]


class Facts:
    """Whatever is not there yet is None, or empty. UserError where `run_dir` is not a run directory."""

    def __init__(self, run_dir: Path):
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir} is not a run directory (it has no config.yaml); train one with run_speedrun.py")
        self.dir = run_dir
        # not load_config: the page can be made where the run's data folder is not at hand
        self.config: RunConfig = from_dict(RunConfig, yaml.safe_load((run_dir / "config.yaml").read_text()))
        self.done = {s: read_json(run_dir / s / "done.json") for s in ("tokenizer", *STAGES, "eval")}
        self.metrics = {s: read_records(run_dir / s / "metrics.jsonl") for s in STAGES}
        found = {s: read_json(run_dir / "evals" / f"{s}.json") for s in STAGES}
        self.evals: dict[str, dict] = {s: e for s, e in found.items() if e}
        self.answers = cache(self._answers)

    def chat(self, stage: str) -> dict[str, dict]:
        """{task: scores} of a stage."""
        return self.evals.get(stage, {}).get("chat") or {}

    def asked_in_part(self) -> str:
        """The tasks of which some stage was not asked all questions, and how many it was; "" where there is none."""
        out = []
        for task in self.tasks():
            found = [r for s in STAGES if (r := self.chat(s).get(task)) and r["n"] < r.get("of", r["n"])]
            if found:
                asked = " or ".join(f"{n:,}" for n in sorted({r["n"] for r in found}))
                out.append(f"{titled(task)} ({asked} of {found[0]['of']:,})")
        return listed(out)

    def core(self, stage: str) -> dict | None:
        core = self.evals.get(stage, {}).get("core")
        return core if core and core["results"] else None

    def tasks(self) -> list[str]:
        """The chat tasks that were asked: those of ChatCORE first, then in the order of the evaluations."""
        asked = dict.fromkeys(name for s in STAGES for name in self.chat(s))
        return [n for n in TITLES if n in asked] + [n for n in asked if n not in TITLES]

    def _answers(self, stage: str, task: str) -> list[dict]:
        """The records of questions and answers; [] where there are none."""
        return records.read(records.path_of(self.dir, stage, task)) or []

    @cached_property
    def seconds(self) -> float:
        """Of all stages that have ended, evaluation included."""
        return sum(mark["seconds"] for mark in self.done.values() if mark)

    @cached_property
    def system(self) -> tuple[dict, bool]:
        """(machine and versions of the first stage that noted them, True), else (those of this process, False)."""
        noted = next((self.done[s]["system"] for s in STAGES if self.done[s] and "system" in self.done[s]), None)
        return (noted, True) if noted else (system_info(), False)

    def peak_memory_gb(self) -> float | None:
        """The largest that any stage or evaluation recorded."""
        marks = [*self.done.values(), *self.evals.values()]
        return max((m["peak_memory_gb"] for m in marks if m and m.get("peak_memory_gb")), default=None)

    def parameters(self) -> int | None:
        if not (self.dir / "tokenizer" / "tokenizer.model").is_file():
            return None
        from nanochat_jax.model import scaling
        from tokenizer import load_tokenizer

        vocab = load_tokenizer(self.dir / "tokenizer").vocab_size
        return scaling.param_counts(scaling.gpt_config(self.config.model, vocab))["total"]
