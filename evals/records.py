"""What an evaluation leaves in a run: evals/<stage>.json with the figures, and what was asked and answered.

README.md says what stands in the files.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evals.tasks.base import prompt_messages, visible
from nanochat_jax.config import read_run_config
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text, read_json
from nanochat_jax.rules import STAGES

SHORT, LONG = 12, 100  # characters of a question that is suggested to visitors
_ASKS = re.compile(r"(what|how|who|where|when|why|which|can|could|would|will|is|are|do|does|did)\b", re.IGNORECASE)


def content_id(content: bytes) -> str:
    """12 hex digits that tell contents apart."""
    return hashlib.sha256(content).hexdigest()[:12]


def said(answer: dict) -> str:
    """A completion as one text, its tool calls in GSM8K's notation."""
    marks = {"text": "{}", "think": "<think> {} </think> ", "python": "<<{}", "python_output": "={}>>"}
    parts = answer.get("parts") or [{"type": "text", "text": answer["completion"]}]
    return "".join(marks[p["type"]].format(p["text"]) for p in parts)


def remarks(answer: dict) -> list[str]:
    """What there is to say of an answer beside its verdict: how long it is, how it ended, why it is wrong."""
    tokens, end = answer.get("tokens"), answer.get("finish_reason", "stop")
    length = f"{tokens:,} token{'s' * (tokens != 1)}" if tokens is not None else ""
    ended = {"stop": "", "length": "cut off at the limit"}.get(end, end)
    lenient = "right by the lenient score" if answer.get("correct_lenient") and not answer["correct"] else ""
    return [remark for remark in (lenient, length, ended, answer.get("reason")) if remark]


def asked(conversation: dict) -> dict:
    """What a record says of a question: id, prompt, expected, and subject where it has one."""
    shown, answer = prompt_messages(conversation), conversation["messages"][-1]
    texts = [visible(m["content"]) for m in shown]
    prompt = "\n\n".join(f"{m['role']}: {t}" for m, t in zip(shown, texts)) if len(shown) > 1 else texts[0]
    out = {"id": content_id(json.dumps(shown, sort_keys=True).encode()), "prompt": prompt}
    expected = conversation.get("answer") or (visible(answer["content"]) if answer["role"] == "assistant" else None)
    optional = {"expected": expected, "subject": conversation.get("subject") or None}
    return out | {name: value for name, value in optional.items() if value is not None}


def split_spec(spec: str) -> tuple[Path, str | None]:
    """RUN or RUN:STAGE as (run directory, stage or None)."""
    run, colon, stage = spec.rpartition(":")
    return (Path(spec), None) if not colon or Path(spec).is_dir() else (Path(run), stage)


def path_of(run_dir: str | Path, stage: str, task: str) -> Path:
    return Path(run_dir) / "evals" / f"{stage}.{task}.jsonl"


def tasks_of(run_dir: str | Path, stage: str) -> list[str]:
    """The tasks that a stage has records of questions and answers of."""
    names = (path.name[len(stage) + 1 : -len(".jsonl")] for path in Path(run_dir).glob(f"evals/{stage}.*.jsonl"))
    return sorted(name for name in names if name != "bpb" and "." not in name)


def write(path: Path, records: Iterable[dict]) -> None:
    """All of them, or none where it fails."""
    atomic_write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read(path: Path) -> list[dict]:
    """The records of a file, [] where there is none. UserError where a line is not a record."""
    out: list[dict] = []
    lines = path.read_bytes().splitlines() if path.is_file() else ()  # of bytes: "\u2028" ends no line
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a record; evaluate that task anew")
        out.append(record)
    return out


def results(run_dir: str | Path) -> dict[str, dict]:
    """{stage: what its evals/<stage>.json says}, in the order of training. UserError where there is nothing."""
    read_run_config(run_dir)  # or UserError
    found: dict[str, Any] = {path.stem: read_json(path) for path in Path(run_dir).glob("evals/*.json")}
    if not found:
        raise UserError(f"no stage of {run_dir} has been evaluated; python -m evals --run-dir {run_dir} does that")
    places = {stage: place for place, stage in enumerate(STAGES)}
    return {stage: found[stage] for stage in sorted(found, key=lambda s: (places.get(s.split("-")[0], len(STAGES)), s))}


def summary(result: dict) -> dict[str, float]:
    """{name: score} of what an evals/<stage>.json holds."""
    scores: dict[str, float | None] = {}
    for name, task in (result.get("chat") or {}).items():
        scores |= {name: task["accuracy"], f"{name}_lenient": task.get("accuracy_lenient")}
    for name, key in (("bpb", "bpb"), ("core", "core_metric"), ("chatcore", "score")):
        scores[name] = (result.get(name) or {}).get(key)
    return {name: round(score, 4) for name, score in scores.items() if score is not None}


def check_stage(run_dir: str | Path, found: dict[str, dict], stage: str) -> str:
    """The stage. UserError where it is not among the `results` of a run."""
    if stage not in found:
        raise UserError(f"stage {stage} of {run_dir} has not been evaluated; there are {', '.join(found)}")
    return stage


def suggestions(run_dir: str | Path, stage: str, most: int = 4) -> list[dict]:
    """[{"kind", "text"}]: short questions that the model answered rightly when it was evaluated, one of each of the
    kinds that it was scored best at. What was not evaluated is not suggested."""
    scores = (read_json(Path(run_dir) / "evals" / f"{stage}.json") or {}).get("chat") or {}
    found = []
    for kind in sorted(scores, key=lambda name: -scores[name]["accuracy"]):
        lines = read(path_of(run_dir, stage, kind))
        right = [line["prompt"] for line in lines if line["correct"] and line.get("finish_reason") == "stop"]
        fit = (p for p in right if SHORT <= len(p) <= LONG and "\n" not in p)
        if best := min(fit, key=lambda p: (not p[0].isupper(), not _is_plain(p), len(p)), default=""):
            found.append({"kind": kind, "text": best})
    return found[:most]


def _is_plain(text: str) -> bool:
    """A question has a question mark, and nothing else has one."""
    last = re.split(r"[.!,] ", text)[-1]
    return text.endswith("?") if _ASKS.match(last) else text[-1] in ".!"
