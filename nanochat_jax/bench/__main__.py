"""python -m nanochat_jax.bench WHAT [options], with WHAT one of those below; each has --help."""

import argparse
import importlib
import json
import sys
from types import ModuleType

from nanochat_jax.cli import command
from nanochat_jax.devices import prepare

WHAT = ("suite", "train", "curve", "ops", "decode", "serve", "memory", "kernels", "demo")


def load(what: str) -> ModuleType:
    return importlib.import_module(f"nanochat_jax.bench.{what}")


def parse(what: str, argv: list[str]) -> argparse.Namespace:
    module = load(what)
    first, *_ = (module.__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog=f"python -m nanochat_jax.bench {what}", description=first)
    module.options(parser)
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> int:
    if not argv or argv[0] not in WHAT:
        print(f"usage: python -m nanochat_jax.bench {'|'.join(WHAT)} [options]", file=sys.stderr)
        return 2
    prepare()
    what, *rest = argv
    if rest[:1] == ["--worker"]:  # `frame.ours` starts this
        load(what).worker(argparse.Namespace(**json.loads(rest[1])))
    elif (result := load(what).run(parse(what, rest))) is not None:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
