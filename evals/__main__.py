"""Evaluates one stage of a run.

    python -m evals --run-dir runs/demo --stage sft --tasks mmlu,gsm8k --max-per-task 100

Tasks are the names of chat tasks, `bpb`, `core` and `samples`; without --tasks it is all that the stage and the data
allow. Results go into evals/<stage>.json of the run, every question and verdict into evals/<stage>.<task>.jsonl, and a
summary, one JSON object, is the last line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from nanochat_jax.errors import UserError


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def summary(result: dict) -> dict:
    """{name: score} of what an evals/<stage>.json holds."""
    out = {}
    for section, key, name in (("bpb", "bpb", "bpb"), ("core", "core_metric", "core")):
        if result.get(section) and result[section][key] is not None:
            out[name] = round(result[section][key], 4)
    out |= {name: round(task["accuracy"], 4) for name, task in result["chat"].items()}
    if result.get("chatcore") and result["chatcore"]["score"] is not None:
        out["chatcore"] = round(result["chatcore"]["score"], 4)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run-dir", required=True, help="the run directory")
    parser.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    parser.add_argument("--tasks", help="a comma-separated choice of chat tasks, bpb, core, samples; default: all")
    parser.add_argument(
        "--max-per-task", type=_count, metavar="N", help="questions per task; default: the run's setting"
    )
    parser.add_argument("--int8", action="store_true", help="weights rounded to int8; results go into <stage>-int8")
    args = parser.parse_args(argv)
    from evals import evaluate_stage

    tasks = [t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else None
    try:
        result = evaluate_stage(
            args.run_dir,
            args.stage,
            tasks=tasks,
            max_per_task=args.max_per_task,
            int8=args.int8,
            log=lambda text: print(text, file=sys.stderr),
        )
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps({"run_dir": args.run_dir, "stage": result["stage"], "scores": summary(result)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
