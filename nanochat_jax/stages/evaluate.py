"""Evaluation of every trained stage that has no result yet: evals/<stage>.json."""

import time

from evals.stage import evaluate_stage
from nanochat_jax.checkpoint import read_done, write_done
from nanochat_jax.stages.run import Run


def main(run: Run) -> dict:
    began = time.perf_counter()
    trained = [s for s in run.config.evals.stages if read_done(run.dir / s)]
    for stage in trained:
        if not (run.dir / "evals" / f"{stage}.json").is_file():
            evaluate_stage(run.dir, stage, run.config, log=run.log.say)
    done = {"seconds": time.perf_counter() - began, "metrics": {"stages": trained}}
    write_done(run.dir / "eval", done)
    return done
