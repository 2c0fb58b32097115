"""The demo over seeds and number formats: what its last model scores in every kind of question, the worst run first.

Each run is `run_speedrun.py` in a directory of its own, and is left out where it is there already. Choose by the worst
run: one run proves little.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from evals.records import results
from nanochat_jax.bench import frame
from nanochat_jax.checkpoint import read_done
from nanochat_jax.cli import positive
from nanochat_jax.errors import UserError

ROOT = Path(__file__).parents[2]
FIRST_SEED = 1337
LOWER_IS_BETTER = ("bpb / base's", "minutes")


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seeds", type=positive, default=3)
    p.add_argument("--dtypes", default="auto", help="with commas between: auto, float32, bfloat16")
    p.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    p.add_argument("--out", default=str(ROOT / "runs" / "demo_seeds"), help="the folder of the runs")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")


def run(args: argparse.Namespace) -> dict:
    found = {}
    for dtype in args.dtypes.split(","):
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            found[f"{dtype} {seed}"] = _scores(args, dtype, seed)
    ordered = sorted(found, key=lambda name: found[name]["everyday"])
    kinds = sorted(found[ordered[0]], key=lambda kind: min(scores[kind] for scores in found.values()))
    worst = {k: (max if k in LOWER_IS_BETTER else min)(scores[k] for scores in found.values()) for k in kinds}
    table = frame.Table()
    for kind in kinds:
        table.row(kind, {"worst": worst[kind], **{name: found[name][kind] for name in ordered}})
    return {"runs": found, "worst": worst}


def _scores(args: argparse.Namespace, dtype: str, seed: int) -> dict[str, float]:
    """Accuracies of the last stage by task, by kind of everyday question, and minutes, of one run."""
    out = Path(args.out) / f"{dtype}_{seed}"
    command = [sys.executable, str(ROOT / "run_speedrun.py"), "--config", args.config, "--run-dir", str(out)]
    settings = [f"seed={seed}", f"dtype={dtype}", *args.settings]
    if subprocess.run([*command, *settings], stdout=sys.stderr).returncode:
        raise UserError(f"the run in {out} failed; its message is above")
    evaluated = results(out)
    last = next(stage for stage in ("rl", "sft", "mid") if stage in evaluated)
    chat = evaluated[last]["chat"]
    scores = {name: task["accuracy"] for name, task in chat.items()}
    scores |= {f"everyday: {k}": of["accuracy"] for k, of in chat.get("everyday", {}).get("subjects", {}).items()}
    base, after = (evaluated[stage]["bpb"]["bpb"] for stage in ("base", last))
    marks = filter(None, map(read_done, filter(Path.is_dir, out.iterdir())))
    return scores | {"bpb / base's": after / base, "minutes": sum(mark["seconds"] for mark in marks) / 60}
