"""Evaluates one stage of a run; shows what it answered; compares two runs or stages.

    python -m evals --run-dir runs/demo --stage sft --tasks mmlu,gsm8k --max-per-task 100
    python -m evals --run-dir runs/demo --tasks humaneval --samples 10 --temperature 0.8      # and pass@k
    python -m evals show runs/demo --task gsm8k --wrong                                       # questions and answers
    python -m evals compare runs/demo:sft runs/demo:rl                                        # is it more than noise?
    python -m evals report --run-dir runs/demo --html                                         # the page about a run

Tasks are the names of chat tasks, `bpb`, `core` and `samples`; without --tasks it is all that the stage and the data
allow. Results go into evals/<stage>.json of the run, every question and verdict into evals/<stage>.<task>.jsonl, and a
summary, one JSON object, is the last line on stdout.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from nanochat_jax.cli import command, positive

EPILOG = "python -m evals show|compare|report --help: what was answered, what differs, and the page about a run."


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


@command
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    name, *rest = argv or [""]
    if name in ("show", "compare", "report"):
        module = importlib.import_module("evals.browse" if name == "show" else f"evals.{name}")
        return module.main(rest)
    return evaluate(argv)


def evaluate(argv: Sequence[str]) -> int:
    """The command without a name: evaluates."""
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.split("\n\n")[0], epilog=EPILOG)
    parser.add_argument("--run-dir", required=True, help="the run directory")
    parser.add_argument("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    parser.add_argument("--tasks", help="a comma-separated choice of chat tasks, bpb, core, samples; default: all")
    parser.add_argument(
        "--max-per-task", type=positive, metavar="N", help="questions per task; default: the run's setting"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="answers drawn to every question, for pass@k")
    parser.add_argument("--temperature", type=float, metavar="T", help="of these; default: the run's setting")
    parser.add_argument("--int8", action="store_true", help="weights rounded to int8; results go into <stage>-int8")
    args = parser.parse_args(argv)
    from evals import evaluate_stage
    from nanochat_jax.devices import prepare

    prepare()
    tasks = [t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else None
    result = evaluate_stage(
        args.run_dir,
        args.stage,
        tasks=tasks,
        max_per_task=args.max_per_task,
        samples=args.samples,
        temperature=args.temperature,
        int8=args.int8,
        log=lambda text: print(text, file=sys.stderr),
    )
    print(json.dumps({"run_dir": args.run_dir, "stage": result["stage"], "scores": summary(result)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
