"""Base models of several depths at several budgets: what compute-optimal training is for a tokenizer, a text, a recipe.

The file holds the settings of a run and a section `sweep`. Every model is an ordinary run directory in --out, trained
by run_speedrun.py in a process of its own; all share the first one's tokenizer. The same command resumes a sweep, also
with more depths and budgets. The results are sweep.md and sweep.json in --out. One host only.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nanochat_jax.checkpoint import read_done
from nanochat_jax.cli import command
from nanochat_jax.config import RunConfig, SweepConfig, check, from_dict, read_settings
from nanochat_jax.errors import UserError
from nanochat_jax.files import claim
from nanochat_jax.model import scaling
from nanochat_jax.planning import plan, sweep_page
from nanochat_jax.planning.runs import Point, train
from nanochat_jax.planning.sweep_page import Result
from nanochat_jax.planning.tree import ROOT
from nanochat_jax.words import count, duration


def read_sweep(path: str, mesh: str | None, overrides: list[str]) -> tuple[SweepConfig, list[Point]]:
    """The sweep that a file describes. UserError."""
    values = read_settings(path, mesh, overrides)
    sweep = from_dict(SweepConfig, values.pop("sweep", {}), "sweep")
    if not sweep.depths or bool(sweep.flops) == bool(sweep.ratios):
        raise UserError(f"{path} needs sweep.depths and either sweep.flops or sweep.ratios: lists of numbers")
    if min(*sweep.depths, *sweep.flops, *sweep.ratios, sweep.aspect_ratio or 1) <= 0:
        raise UserError(f"depths, budgets and aspect_ratio of the sweep in {path} must be more than 0")
    budgets = sweep.flops or sweep.ratios
    if len(set(sweep.depths)) < len(sweep.depths) or len(set(budgets)) < len(budgets):
        raise UserError(f"a depth or a budget stands twice in the sweep of {path}")
    config = from_dict(RunConfig, values)
    check(config)
    return sweep, [_point(config, sweep, d, b) for b in sorted(budgets) for d in sweep.depths]


def _point(config: RunConfig, sweep: SweepConfig, depth: int, budget: float) -> Point:
    model = replace(config.model, depth=depth)
    if sweep.aspect_ratio:
        width = -(-sweep.aspect_ratio * depth // model.head_dim) * model.head_dim
        model = replace(model, width=width)
    cfg = scaling.gpt_config(model, config.tokenizer.vocab_size)
    if sweep.flops:
        name, tokens = f"d{depth}-{budget:g}".replace("+", ""), budget / scaling.flops_per_token(cfg)
    else:
        name, tokens = f"d{depth}-ratio{budget:g}", budget * scaling.scaling_params(cfg)
    made = replace(config, model=model, base=replace(config.base, tokens=int(tokens)))
    check(made)
    return Point(name, budget, made)


def results(points: list[Point], out: Path) -> list[Result]:
    found = []
    for point in points:
        if done := read_done(out / point.name / "base"):
            cfg, metrics = scaling.gpt_config(point.config.model, point.config.tokenizer.vocab_size), done["metrics"]
            sizes = (cfg.n_layer, cfg.n_embd, scaling.scaling_params(cfg), scaling.param_counts(cfg)["total"])
            trained = (done["tokens"], done["epochs"], scaling.flops_per_token(cfg))
            losses = (metrics["val_bpb"], metrics["val_loss"])
            found.append(Result(point.name, point.budget, *sizes, *trained, *losses, done["seconds"]))
    return found


def show_plan(points: list[Point], args: argparse.Namespace) -> None:
    """Prints what would be trained and for how long, at the speed of published runs or of one that was measured."""
    if args.measured == "":
        raise UserError("--measured of a sweep needs a run directory whose speed it takes")
    stages, table = [], plan.table_of("run", "parameters", "tokens", "steps", "batch", "FLOPs", "time")
    for point in points:
        on = plan.machine(args.gpu, args.count, args.price, point.config)
        made, _ = plan.make(point.config, on, args.measured, exact=False)
        _, base, *_ = made.stages()
        work = (count(base.tokens), f"{base.steps:,}", count(base.batch_tokens), f"{base.flops:.2e}")
        table.add_row(point.name, count(scaling.scaling_params(made.cfg)), *work, plan.time_of(base))
        stages.append(base)
    Console().print(table)
    whole = plan.summed(stages)
    cost = plan.dollars(whole, on)
    said = duration(whole.seconds) + ("" if math.isnan(cost) else f", ${cost:,.2f}")
    if any(math.isnan(base.seconds) for base in stages):
        said = "a time that is not known: --measured RUN_DIR or --gpu may tell"
    print(f"{len(points)} models, {whole.flops:.2e} FLOPs, {said}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.scaling", description=__doc__.split("\n\n")[0])
    p.add_argument("what", choices=["sweep"])
    p.add_argument("file", metavar="FILE", help="settings of a run and a section `sweep`: configs/miniseries_cpu.yaml")
    p.add_argument("--mesh", help="YAML file of mesh axes, such as configs/mesh/h100_x8.yaml")
    p.add_argument("--out", type=Path, help="folder of the runs; default: runs/<name of the file>")
    p.add_argument("--plan", action="store_true", help="say what would be trained and for how long; nothing runs")
    p.add_argument("--gpu", help="plan for such a GPU: rtx4090, a100, a100_80, h100, h200; default: what is here")
    p.add_argument("--count", type=int, help="plan for so many of them")
    p.add_argument("--price", type=float, help="dollars an hour of one device")
    p.add_argument("--measured", metavar="RUN_DIR", help="plan at a run's speed")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    return p.parse_intermixed_args(argv)  # settings may stand after options


@command(resumes="from there")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sweep, points = read_sweep(args.file, args.mesh, args.settings)
    if args.plan:
        show_plan(points, args)
        return 0
    out = args.out or ROOT / "runs" / Path(args.file).stem
    with claim(out / ".lock"):
        failed = train(points, out)
        found = results(points, out)
        if not found:
            raise UserError(f"no model of the sweep was trained; {out}/*/log.txt says why")
        print(json.dumps(sweep_page.write(out, sweep, found, failed)))
    return 1 if failed else 0
