"""Exports a trained stage as a folder of weights that other libraries load.

`classic` becomes a model of transformers' own type `nanochat`, which loads it without code of ours. `modern`, for which
transformers has no type, becomes safetensors under karpathy/nanochat's names. weights/README.md has examples.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from nanochat_jax.cli import command
from nanochat_jax.files import whole_folder


def notes(loaded) -> dict[str, str]:
    """Where the weights came from, for the header of their file; those of an imported stage as they were there."""
    meta = loaded.meta
    if "origin" in meta:
        return meta["origin"]
    made = {"producer": "nanochat_jax", "arch": loaded.config.model.arch, "stage": loaded.stage, "step": loaded.step}
    kept = {key: meta[key] for key in ("seed", "tokenizer", "config") if key in meta}
    return {key: str(value) for key, value in {"format": "pt", **made, **kept}.items()}


@command
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.export", description=__doc__.split("\n\n")[0])
    p.add_argument("--run-dir", required=True, type=Path, help="the run directory")
    p.add_argument("--stage", help="base, mid, sft or rl; default: the latest finished one")
    p.add_argument("--to", required=True, type=Path, help="the folder to make")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arrays; default float32")
    args = p.parse_args(argv)
    from nanochat_jax.checkpoint import load_model
    from nanochat_jax.weights.folder import write_folder

    loaded = load_model(args.run_dir, args.stage)
    with whole_folder(args.to) as folder:
        write_folder(folder, loaded.params, loaded.model.cfg, loaded.tokenizer, notes(loaded), args.dtype)
    made = {"to": str(args.to), "arch": loaded.config.model.arch, "stage": loaded.stage, "step": loaded.step}
    print(json.dumps(made | {"bytes": sum(path.stat().st_size for path in args.to.iterdir())}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # beside a run that has the accelerator's memory
    sys.exit(main())
