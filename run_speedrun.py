"""The whole of a small ChatGPT: tokenizer, base, mid, sft, rl, eval, report.

    uv run run_speedrun.py                                     # what fits this machine
    uv run run_speedrun.py --stages sft,rl,eval,report --yes sft.epochs=2     # anew, from what mid learned

Stages run in order; one that is done in the run directory is skipped, and one that was stopped resumes from its last
checkpoint. A stage whose settings changed runs anew where --stages names it, and so does what comes after it. The last
line on stdout is a JSON object with the run directory, the seconds of each stage and the scores.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from nanochat_jax import processes, rules
from nanochat_jax.cli import command
from nanochat_jax.config import RunConfig, differences, dump_yaml, load_config, read_run_config, to_dict
from nanochat_jax.errors import Interrupted, UserError
from nanochat_jax.files import atomic_write_text, read_json
from nanochat_jax.mesh import hosts
from nanochat_jax.settings import described

ROOT = Path(__file__).resolve().parent
STAGES = ("tokenizer", *rules.STAGES, "eval", "report")
ON_ONE_HOST = ("rl", "eval", "report")  # short stages, which run on a single host


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=f"stages: {', '.join(STAGES)}; settings: model.depth=6 and so on"
    )
    p.add_argument("--config", help="YAML file of settings; default: what fits this machine")
    p.add_argument("--mesh", help="YAML file of mesh axes, such as configs/mesh/h100_x8.yaml")
    p.add_argument("--run-dir", help="default: runs/<name of the configuration>")
    p.add_argument("--stages", help="a comma-separated choice, run in the pipeline's order")
    p.add_argument("--yes", action="store_true", help="lose the checkpoints of stages that changed settings make anew")
    p.add_argument(
        "--settings", dest="word", nargs="?", const="", metavar="WORD", help="list settings, all or with WORD"
    )
    p.add_argument("--plan", action="store_true", help="say what the run would take, and run nothing")
    p.add_argument("--budget", type=float, metavar="DOLLARS", help="say how deep a model a budget trains")
    p.add_argument("--gpu", help="plan for such a GPU: rtx4090, a100, a100_80, h100, h200; default: what is here")
    p.add_argument("--count", type=int, help="plan for so many of them")
    p.add_argument("--price", type=float, help="dollars an hour of one device")
    p.add_argument("--measured", nargs="?", const="", metavar="RUN_DIR", help="plan at its speed; alone: time steps")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    return p.parse_args(argv)


def fitting_config(gigabytes: float | None = None) -> Path:
    """demo.yaml on a CPU; else the deepest of the miniseries whose state and activations fit one device's memory, or
    `gigabytes`."""
    import jax

    if gigabytes is None:
        if jax.default_backend() == "cpu":
            return ROOT / "configs" / "demo.yaml"
        stats = jax.devices()[0].memory_stats() or {}
        gigabytes = stats.get("bytes_limit", 16e9) / 1e9
    depth = next((d for d, need in ((24, 60), (20, 40), (12, 12)) if gigabytes >= need), None)
    return ROOT / "configs" / (f"d{depth}.yaml" if depth else "demo.yaml")


def plan(args: argparse.Namespace) -> int:
    from nanochat_jax.planning import plan, targets

    if args.measured and "=" in args.measured:  # the setting behind a --measured that stands alone
        args.settings, args.measured = [args.measured, *args.settings], ""
    described = targets.GPUS.get(args.gpu)
    path = args.config or fitting_config(described.gb if described else None)
    return plan.main(load_config(path, args.mesh, args.settings), args)


def clear_changed(run_dir: Path, config: RunConfig, named: list[str], sure: bool) -> str:
    """Removes what was made with other settings, from the first stage on that these concern; what to say of that, ""
    where nothing was.

    UserError where `named`, the stages that were asked for by name, do not hold that stage, or checkpoints would be
    lost and nobody is `sure`.
    """
    old, new = to_dict(read_run_config(run_dir)), to_dict(config)
    changed = differences(old, new)
    sections = {path.split(":")[0].split(".")[0] for path in changed}
    first = next((i for i, stage in enumerate(STAGES[1:5], 1) if stage in sections), 0)
    first = first if sections <= set(STAGES[1:5]) else 0
    lost = [s for s in STAGES[first:5] if (run_dir / s).exists()] if changed else []
    if not lost:
        if "eval" in named and old["evals"] != new["evals"]:
            shutil.rmtree(run_dir / "eval", ignore_errors=True)  # a mark alone: scores stay until there are new ones
        return ""
    what = f"{run_dir} was made with other settings ({'; '.join(changed[:3])})"
    if STAGES[first] not in named:
        raise UserError(f"{what}; take the same ones, another --run-dir, or name {STAGES[first]} in --stages")
    if not sure:
        raise UserError(f"{what}; {' and '.join(lost)} would be made anew and their checkpoints lost: --yes does that")
    for stage in (*lost, "eval"):
        shutil.rmtree(run_dir / stage, ignore_errors=True)
        for record in (run_dir / "evals").glob(f"{stage}.*"):
            record.unlink()
    return f"{what}: {' and '.join(lost)} removed, to be made anew"


def open_run(args: argparse.Namespace, named: list[str]):
    """The run directory, new or resumed. UserError where it was made with other settings."""
    import jax

    from evals import sandbox
    from evals.tasks import check_names
    from nanochat_jax.devices import use_compilation_cache
    from nanochat_jax.mesh.preemption import Stop
    from nanochat_jax.stages.run import Run
    from nanochat_jax.tracking import sinks
    from nanochat_jax.tracking.tracking import RunLog

    path = Path(args.config) if args.config else fitting_config()
    config = load_config(path, args.mesh, args.settings)
    if config.evals.sandbox == "required":
        sandbox.prepare(config.evals.sandbox, print)  # now, and not after hours of training
    sinks.check(config.tracking)
    check_names(config)
    jax.devices()  # so that one that is missing is found before anything is written
    run_dir = Path(args.run_dir) if args.run_dir else ROOT / "runs" / path.stem
    cleared = ""
    if (run_dir / "config.yaml").is_file():
        if hosts.is_main():
            cleared = clear_changed(run_dir, config, named, args.yes)
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and not a run directory; take another --run-dir")
    hosts.barrier("settings compared")
    if hosts.is_main():
        atomic_write_text(run_dir / "config.yaml", dump_yaml(config))
    hosts.barrier("run directory")
    run = Run(run_dir, config, RunLog(run_dir, silent=not hosts.is_main()), Stop())
    hosts.log_to(run.log.write)
    if cleared:
        run.log.say(cleared)
    use_compilation_cache(run.cache_dir / "compiled")
    return run


def run_stage(run, name: str) -> None:
    from evals.report import write_report
    from nanochat_jax.stages import base, evaluate, finetune, rl, tokenize

    work = {
        "tokenizer": tokenize.main,
        "base": base.main,
        "mid": lambda run: finetune.main(run, "mid"),
        "sft": lambda run: finetune.main(run, "sft"),
        "rl": rl.main,
        "eval": evaluate.main,
        "report": lambda run: run.log.say(f"report: {write_report(run.dir, html=True)}"),
    }
    work[name](run)


def needs(run, name: str, chosen: list[str]) -> None:
    """UserError where an earlier stage that `name` reads has neither run nor been asked for."""
    before = {"base": ("tokenizer",), "mid": ("base",), "sft": ("base", "mid"), "rl": ("base", "mid", "sft")}
    before |= dict.fromkeys(("eval", "report"), ("base", "mid", "sft", "rl"))  # weights may have come in at any of them
    wanted = before.get(name)
    if wanted and not any(stage in chosen or (run.dir / stage / "done.json").is_file() for stage in wanted):
        raise UserError(f"stage {name} needs {wanted[0]}, which has not run in {run.dir}; add it to --stages")


def pipeline(args: argparse.Namespace) -> dict:
    named = [s.strip() for s in (args.stages or "").split(",") if s.strip()]
    chosen = named if args.stages is not None else list(STAGES)
    unknown = sorted(set(chosen) - set(STAGES))
    if unknown or not chosen:
        raise UserError(f"unknown stage {unknown[0] if unknown else repr(args.stages)}; stages are {', '.join(STAGES)}")
    from evals import records
    from nanochat_jax.checkpoint import read_done

    run = open_run(args, named)
    left = [s for s in ON_ONE_HOST if s in chosen and hosts.count() > 1]
    seconds = {}
    with run.stop:
        for name in [s for s in STAGES if s in chosen and s not in left]:
            needs(run, name, chosen)
            if name == "report" or not read_done(run.dir / name):
                run.log.say(f"— {name}")
                if hosts.is_main() or name != "tokenizer":
                    run_stage(run, name)
            hosts.barrier(f"{name} done")
            if mark := read_done(run.dir / name):
                seconds[name] = round(mark["seconds"], 1)
        if left:
            run.log.say(f"{', '.join(left)}: run on one host; the same command on one of them resumes there")
    found = {stage: read_json(run.dir / "evals" / f"{stage}.json") for stage in STAGES}
    scores = {stage: records.summary(result) for stage, result in found.items() if result}
    return {"run_dir": str(run.dir), "seconds": seconds, "scores": scores}


@command(resumes="from the last checkpoint")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.word is not None:
        print(described(args.word))
        return 0
    from nanochat_jax.devices import prepare

    prepare()
    if args.plan or args.budget is not None:
        return plan(args)
    with hosts.together(say=lambda text: print(text, file=sys.stderr), orderly=(Interrupted,)):
        result = pipeline(args)
        if hosts.is_main():
            print(json.dumps(result))
    return 0


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
