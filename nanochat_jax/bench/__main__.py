"""python -m nanochat_jax.bench WHAT [options], with WHAT one of those below; each has --help."""

from __future__ import annotations

import importlib
import sys

from nanochat_jax.cli import command

WHAT = ("suite", "train", "curve", "ops", "decode", "core", "serve", "data", "memory", "kernels", "evals")


@command
def main(argv: list[str]) -> int:
    if not argv or argv[0] not in WHAT:
        print(f"usage: python -m nanochat_jax.bench {'|'.join(WHAT)} [options]", file=sys.stderr)
        return 2
    from nanochat_jax.devices import prepare

    prepare()
    return importlib.import_module(f"nanochat_jax.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
