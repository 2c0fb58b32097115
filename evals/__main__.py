"""Evaluates one stage of a run; shows what it answered; compares two runs or stages.

Tasks are the names of chat tasks, `bpb`, `core` and `samples`; without --tasks it is all that the stage and the data
allow. Results go into the folder evals of the run, and a summary, one JSON object, is the last line on stdout.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from nanochat_jax.cli import command, positive

OTHERS = {"show": "evals.browse", "compare": "evals.compare", "report": "evals.report"}
EPILOG = "python -m evals show|compare|report --help: what was answered, what differs, and the page about a run."


@command
def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in OTHERS:
        return importlib.import_module(OTHERS[argv[0]]).main(argv[1:])
    return evaluate(argv)


def evaluate(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.split("\n\n")[0], epilog=EPILOG)
    option = parser.add_argument
    option("--run-dir", required=True, help="the run directory")
    option("--stage", help="base, mid, sft or rl; default: the latest that has ended")
    option("--tasks", help="a comma-separated choice of chat tasks, bpb, core, samples; default: all")
    option("--max-per-task", type=positive, metavar="N", help="questions per task; default: the run's setting")
    option("--samples", type=positive, metavar="N", help="answers drawn to every question, for pass@k")
    option("--temperature", type=float, metavar="T", help="of these; default: the run's setting")
    option("--int8", action="store_true", help="weights rounded to int8; results go into <stage>-int8")
    args = parser.parse_args(argv)
    from evals.records import summary
    from evals.stage import evaluate_stage
    from nanochat_jax.devices import prepare

    prepare()
    tasks = [t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else None
    result = evaluate_stage(**vars(args) | {"tasks": tasks}, log=lambda text: print(text, file=sys.stderr))
    print(json.dumps({"run_dir": args.run_dir, "stage": result["stage"], "scores": summary(result)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
