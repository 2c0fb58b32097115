"""Whether a change to the recipe is better than chance: variants beside a base, over seeds, as compute multipliers.

The file holds the settings of a run and a section `experiment`. Every run trains a base model in a process of its own,
in a folder of --out; the same command resumes, also with more seeds, lengths and variants. The results are
experiment.md, its plot and experiment.json in --out; what ran with other code is named there. Weights are not kept. One
host only.
With --minutes it trains the base alone, for so long, prints its bits per byte and adds a line to --out's log.tsv.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.checkpoint import read_done
from nanochat_jax.cli import command, positive
from nanochat_jax.config import ExperimentConfig, RunConfig, check, from_dict, read_settings
from nanochat_jax.errors import UserError
from nanochat_jax.files import claim
from nanochat_jax.model import scaling
from nanochat_jax.planning import attempts, experiment_page
from nanochat_jax.planning.runs import Point, Run, base_result, point, probe, speed, train
from nanochat_jax.planning.tree import ROOT

BASE = "base"


@dataclass(frozen=True)
class Experiment:
    settings: ExperimentConfig
    configs: dict[str, RunConfig]  # the base's first, each of one seed and length


def read_experiment(path: str, mesh: str | None, overrides: list[str]) -> Experiment:
    """The experiment that a file describes. UserError."""
    values = read_settings(path, mesh, overrides)
    settings = from_dict(ExperimentConfig, values.pop("experiment", {}), "experiment")
    if 1 not in settings.lengths or len(set(settings.lengths)) < 2 or min(settings.lengths) <= 0:
        raise UserError(f"experiment.lengths in {path} must be 1 and, for the base's curve, another, such as [1, 1.4]")
    if settings.seeds < 2:
        raise UserError(f"experiment.seeds in {path} must be 2 or more: from one seed chance cannot be told")
    configs = {}
    for name, changes in {BASE: (), **settings.variants}.items():
        if (name == BASE and name in settings.variants) or not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{name!r} cannot be a variant's name; take letters, digits, - and _, and not {BASE!r}")
        changed = read_settings(path, mesh, [*overrides, *changes])
        changed.pop("experiment", None)
        configs[name] = from_dict(RunConfig, changed)
        check(configs[name])
    return Experiment(settings, configs)


def planned_tokens(config: RunConfig) -> int:
    cfg = scaling.gpt_config(config.model, config.tokenizer.vocab_size)
    return scaling.base_plan(cfg, config).target_tokens


def probes(experiment: Experiment) -> list[Point]:
    """Short runs that tell the speed, where the budget is one of time."""
    if experiment.settings.minutes is None:
        return []
    return [probe(name, config) for name, config in experiment.configs.items()]


def points(experiment: Experiment, out: Path) -> dict[tuple[str, float], list[Point]]:
    """By variant and length, one for each seed."""
    wanted = {}
    settings = experiment.settings
    for name, config in experiment.configs.items():
        tokens: float = planned_tokens(config)
        if settings.minutes:
            tokens = speed(out / f"{name}-probe") * 60 * settings.minutes
        for length in settings.lengths if name == BASE else (1,):
            called = f"{name}-x{length:g}" if length != 1 else name
            seeds = range(settings.seeds)
            wanted[name, length] = [point(f"{called}-{s}", config, length * tokens, s) for s in seeds]
    return wanted


def results(wanted: list[Point], out: Path) -> dict[int, Run]:
    """By the place of its seed, each run that was trained."""
    return {s: base_result(out / one.name) for s, one in enumerate(wanted) if read_done(out / one.name / "base")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.planning.experiment", description=__doc__)
    p.add_argument("file", metavar="FILE", help="settings of a run and a section `experiment`")
    p.add_argument("--mesh", help="YAML file of mesh axes, such as configs/mesh/h100_x8.yaml")
    p.add_argument("--out", type=Path, help="folder of the runs; default: runs/<name of the file>")
    p.add_argument("--jobs", type=positive, default=1, help="runs at a time, each on its part of the cores or GPUs")
    p.add_argument("--minutes", type=float, help="train the base once, for so many minutes, and add a line to log.tsv")
    p.add_argument("--note", default="", help="with --minutes: what was changed, for the log")
    p.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings that override the file's; a variant's own override these",
    )
    return p.parse_intermixed_args(argv)


@command(resumes="from there")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.minutes is not None and args.minutes <= 0:
        raise UserError("--minutes must be more than 0")
    if args.note and args.minutes is None:
        raise UserError("--note is for the log of attempts: give --minutes as well")
    if args.jobs > 1 and args.minutes is not None:
        raise UserError("an attempt is one run: leave --jobs out, or --minutes")
    experiment = read_experiment(args.file, args.mesh, args.settings)
    out = args.out or ROOT / "runs" / Path(args.file).stem
    with claim(out / ".lock"):
        if args.minutes:
            print(json.dumps(attempts.attempt(experiment.configs[BASE], out, args.minutes, args.note)))
            return 0
        if failed := train(probes(experiment), out, args.jobs, keep=False):
            raise UserError(f"{failed[0]} failed; {out / failed[0] / 'log.txt'} says why")
        wanted = points(experiment, out)
        # a seed's runs stand beside each other, so that the machine's drift is the same for all
        in_turns = [of[s] for s in range(experiment.settings.seeds) for of in wanted.values()]
        failed = train(in_turns, out, args.jobs, keep=False)
        found = {key: results(of, out) for key, of in wanted.items()}
        if not any(found.values()):
            raise UserError(f"no model of the experiment was trained; {out}/*/log.txt says why")
        print(json.dumps(experiment_page.write(out, BASE, experiment.settings, found, failed)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
