"""A run directory made of numbers: all that a run on eight GPUs leaves but for its models."""

import json
import random
from pathlib import Path

from evals import records
from evals.chat import chatcore
from evals.report.facts import TITLES

STAGES = ("base", "mid", "sft", "rl")
HOSTILE = (
    "</code></pre><script>alert(1)</script>\n````\n# out | of | the fence <img src=http://a.test/x.png> \x1b[2J\u202e"
)
CONFIG = """
price_per_hour: 24
model: {depth: 20}
data: {source: hub}
evals: {max_per_task: 200}
rl: {max_new_tokens: 256}
"""
SYSTEM = {
    "cpu": "AMD EPYC",
    "cores": 192,
    "memory_gb": 2000.0,
    "devices": ["NVIDIA H100 80GB HBM3"] * 8,
    "os": "Linux 6.8",
    "python": "3.11.7",
    "jax": "0.10.2",
    "flax": "0.12.8",
    "commit": "abc1234",
}
CORE_TASKS = ("hellaswag_zeroshot", "jeopardy", "arc_easy", "arc_challenge", "copa", "squad", "boolq")
SUBJECTS = ("abstract_algebra", "anatomy", "college_computer_science", "world_religions")


def full_run(folder: Path, steps: int = 24) -> Path:
    """All stages, ended and evaluated."""
    rng = random.Random(0)
    (folder / "evals").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    for i, stage in enumerate(STAGES):
        (folder / stage).mkdir()
        lines = [_record(stage, step, steps, rng) for step in range(1, steps + 1)]
        lines += [{"step": s, **_assessed(stage, s, steps)} for s in (0, steps // 2, steps)]
        (folder / stage / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
        mark = {"seconds": 3600.0 * (4 - i), "steps": steps, "tokens": steps * 524288, "system": SYSTEM}
        if stage == "base":
            mark |= {"packed": {"documents": 9, "tokens": 900, "tokens_cropped": 100}, "epochs": 2.5}
        elif stage != "rl":
            mark |= {"packed": {"conversations": 9000, "cropped": 12, "dropped": 3}}
        put(folder / stage / "done.json", mark)
        put(folder / "evals" / f"{stage}.json", _evaluated(stage, i, rng))
    records.write(records.path_of(folder, "rl", "gsm8k"), [_answer(k, k == 1) for k in range(4)])
    records.write(records.path_of(folder, "rl", "humaneval"), [{**_answer(0, False), "reason": f"failed: {HOSTILE}"}])
    return folder


def put(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _record(stage: str, step: int, steps: int, rng: random.Random) -> dict:
    out = {"step": step, "loss": 3 + 8 / step + 0.2 * rng.random(), "tokens_per_second": 4e5 + 1e4 * rng.random()}
    out["mfu"] = out["tokens_per_second"] / 1e6
    if stage == "rl":
        out |= {"reward": 0.3 + 0.3 * step / steps, "completion_tokens": 64.0, "truncated": 0.02 * rng.random()}
        out |= {"entropy": 1 - 0.5 * step / steps, "kl": 0.001 * step, "clip_fraction": 0.01 * rng.random()}
    return out


def _assessed(stage: str, step: int, steps: int) -> dict:
    if stage == "rl":
        return {f"pass@{k}": 0.2 + 0.1 * step / steps + 0.05 * k for k in (1, 2, 8)}
    core = {"core": 0.1 + 0.1 * step / steps} if stage == "base" and step else {}
    return {"val_bpb": 0.8 + 0.3 * (1 - step / steps), **core}


def _evaluated(stage: str, i: int, rng: random.Random) -> dict:
    bpb = {"bpb": 0.8 + 0.1 * i, "stderr": 0.002, "bytes": 9, "rows": 3}
    out = {"stage": stage, "bpb": bpb, "core": None, "chat": {}, "chatcore": None}
    out["samples"] = [{"prompt": f"Prompt of {stage}", "completion": f"An answer {HOSTILE}", "finish_reason": "stop"}]
    if stage == "base":
        return out | {"core": core(rng)}
    for name in TITLES:
        categorical = name in ("arc_easy", "arc_challenge", "mmlu")
        out["chat"][name] = _task(
            0.3 + 0.05 * i, 0.25 if categorical else 0.0, "categorical" if categorical else "generative"
        )
    out["chat"]["gsm8k"] |= {"accuracy_lenient": 0.5 + 0.05 * i, "stderr_lenient": 0.03, "lenient": "$72 | `72.`"}
    of_subjects = {s: {"accuracy": 0.2 + 0.3 * rng.random(), "stderr": 0.04, "n": 16} for s in SUBJECTS}
    out["chat"]["mmlu"] |= {"subjects": of_subjects, "macro": {"accuracy": 0.34, "stderr": 0.01}}
    draws = {f"pass@{k}": {"value": 0.1 * k, "stderr": 0.02} for k in (1, 2, 4)}
    out["chat"]["humaneval"] |= {"samples": 4, "temperature": 0.8, "pass_at_k": draws}
    whole = chatcore(out["chat"], tuple(TITLES))
    verdicts = {
        "calls": {"accuracy": 0.7 + 0.05 * i, "stderr": 0.03, "n": 100},
        "answer": {"accuracy": 0.5, "stderr": 0.03, "n": 200},
    }
    out["chat"]["tools"] = _task(0.4, 0.0, "generative") | {"aspects": verdicts}
    thoughts = {s: {"accuracy": 0.5, "stderr": 0.04, "n": 16, "tokens": n} for s, n in (("off", 8.0), ("on", 20.5))}
    out["chat"]["thinking"] = _task(0.5, 0.0, "generative") | {
        "subjects": thoughts,
        "macro": {"accuracy": 0.5, "stderr": 0.01},
    }
    return out | {"chatcore": whole}


def _task(accuracy: float, baseline: float, kind: str) -> dict:
    centered = (accuracy - baseline) / (1 - baseline)
    out = {"accuracy": accuracy, "stderr": 0.03, "n": 200, "of": 1319, "baseline": baseline, "centered": centered}
    return out | {"kind": kind, **({"unfinished": 0.1} if kind == "generative" else {})}


def core(rng: random.Random) -> dict:
    chance = {t: rng.choice((0.0, 0.25, 0.5)) for t in CORE_TASKS}
    results = {t: chance[t] + (1 - chance[t]) * (0.5 * rng.random() - 0.05 * bool(chance[t])) for t in CORE_TASKS}
    centered = {t: (results[t] - chance[t]) / (1 - chance[t]) for t in CORE_TASKS}
    metric = sum(centered.values()) / len(CORE_TASKS)
    return {
        "results": results,
        "centered": centered,
        "stderr": {t: 0.03 for t in CORE_TASKS},
        "n": {t: 200 for t in CORE_TASKS},
        "substitutes": {"squad": "squad.other|set.jsonl"},
        "missing": ["coqa"],
        "core_metric": metric,
        "core_stderr": 0.005,
        "n_tasks": len(CORE_TASKS),
        "total_tasks": len(CORE_TASKS) + 1,
        "max_per_task": 200,
        "partial": True,
    }


def _answer(index: int, correct: bool) -> dict:
    out = {
        "index": index,
        "prompt": f"What is {index} + 1? {HOSTILE}",
        "expected": f"It is {index + 1}.\n#### {index + 1}",
    }
    return out | {"completion": f"#### {index} {HOSTILE}", "finish_reason": "length", "tokens": 256, "correct": correct}
