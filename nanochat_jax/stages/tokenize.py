"""The tokenizer: trained on the documents' training split, kept in the run directory."""

from __future__ import annotations

import itertools
import time

from nanochat_jax.checkpoint import write_done
from nanochat_jax.stages.common import Run
from tokenizer.evaluate import evaluate
from tokenizer.train import train_tokenizer

HELD_OUT_DOCUMENTS = 500  # of the validation split, for bytes per token


def main(run: Run) -> dict:
    began = time.perf_counter()
    out = run.dir / "tokenizer"
    stats = train_tokenizer(run.documents.train(), out, run.config.tokenizer, log=run.log.say)
    held_out = list(itertools.islice(run.documents.val(), HELD_OUT_DOCUMENTS))
    compared = evaluate(run.tokenizer, held_out)
    done = {"seconds": time.perf_counter() - began, "metrics": {**stats, "bytes_per_token": compared}}
    write_done(out, done)
    return done
