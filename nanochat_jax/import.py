"""Turns a folder of weights into a run directory with a finished stage: to chat with, serve, evaluate and train on.

Takes what `python -m nanochat_jax.export` wrote, folders of transformers' `nanochat`, and karpathy/nanochat's own
checkpoints: model_<step>.pt, meta_<step>.json and tokenizer.pkl, the newest step. No PyTorch is needed. The settings,
of which those of the model come from the folder, are what later stages train with.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from nanochat_jax.cli import command
from nanochat_jax.config import dump_yaml, fingerprint, load_config, to_dict
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text, whole_folder
from nanochat_jax.rules import STAGES


def import_weights(args: argparse.Namespace) -> dict:
    """Makes the run directory, whole or not at all; returns what there is to say of it. UserError."""
    from nanochat_jax.checkpoint import Checkpointer, write_done
    from nanochat_jax.model import scaling
    from nanochat_jax.model.gpt import init_params
    from nanochat_jax.weights.folder import read_folder
    from nanochat_jax.weights.names import from_reference

    source, weights = args.source, read_folder(args.source, args.tokenizer)
    stage = args.stage or weights.notes.get("stage")
    if stage not in STAGES:
        raise UserError(f"{source} does not say which stage it is of; add --stage and one of {', '.join(STAGES)}")
    notes = weights.notes
    if "stage" not in notes:
        notes = {"imported_from": source.resolve().name, "stage": stage, "step": "0", **notes, "format": "pt"}
    step = int(notes["step"]) if notes.get("step", "").isdecimal() else 0
    sizes = {f"model.{key}": value for key, value in to_dict(weights.model).items()}
    sizes["tokenizer.vocab_size"] = weights.vocab_size
    theirs = [f"{key}={'' if value is None else value}" for key, value in sizes.items()]
    config = load_config(args.config, None, [*args.settings, *theirs])
    cfg = scaling.gpt_config(config.model, weights.vocab_size)
    try:
        template = jax.eval_shape(lambda: init_params(cfg, 0))
        params = from_reference(weights.tensors, template, cfg, naming=weights.naming)
    except KeyError as e:
        raise UserError(f"the weights in {source} lack {e}") from None
    except ValueError as e:
        raise UserError(f"the weights in {source} are of another architecture: {e}") from None
    meta = {"stage": stage, "tokenizer": weights.tokenizer.hash, "config": fingerprint(config), "origin": notes}
    mark = {"stage": stage, "steps": step, "tokens": 0, "seconds": 0.0, "metrics": {}, "imported": notes}
    plan = scaling.plan(cfg, batch_tokens=config.base.batch_tokens, head_dim=config.model.head_dim)
    with whole_folder(args.run_dir) as folder:
        weights.tokenizer.save(folder / "tokenizer")
        write_done(folder / "tokenizer", {"seconds": 0.0, "metrics": {}})
        checkpointer = Checkpointer(folder / stage / "checkpoints")
        checkpointer.save(step, {"params": jax.tree.map(jnp.asarray, params)}, meta)
        checkpointer.close()
        write_done(folder / stage, {**mark, "batch_tokens": plan.batch_tokens})
        atomic_write_text(folder / "config.yaml", dump_yaml(config))
    total = scaling.param_counts(cfg)["total"]
    return {"run_dir": str(args.run_dir), "arch": config.model.arch, "stage": stage, "step": step, "parameters": total}


@command
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.import", description=__doc__.split("\n\n")[0])
    p.add_argument("--from", required=True, type=Path, dest="source", help="the folder of weights")
    p.add_argument("--run-dir", required=True, type=Path, help="the run directory to make")
    p.add_argument("--stage", help="base, mid, sft or rl; default: what the weights say that they are of")
    p.add_argument("--tokenizer", type=Path, help="the folder of their tokenizer, if it is another one")
    p.add_argument("--config", help="YAML file of settings for later stages")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    print(json.dumps(import_weights(p.parse_args(argv))))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # beside a run that has the accelerator's memory
    sys.exit(main())
