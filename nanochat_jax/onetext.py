"""The whole repository as one text, to paste into a language model's prompt.

    python -m nanochat_jax.onetext > nanochat_jax.txt            # [--tests]

Every text file of the checkout, in reading order: README.md and run_speedrun.py first.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat_jax.cli import command
from nanochat_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("README.md", "run_speedrun.py", "nanochat_jax", "tokenizer", "evals", "server", "configs")


def files(tests: bool = False) -> list[Path]:
    """Paths of the text files that git tracks, in reading order. UserError outside of a checkout."""
    command = ["git", "-C", str(ROOT), "grep", "-I", "--files-with-matches", ""]  # -I: no binary ones
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{ROOT} is not a git checkout, which is what says which files belong to it")

    def place(path: Path) -> tuple:
        part = path.parts[0]
        return FIRST.index(part) if part in FIRST else len(FIRST), len(path.parts), str(path)

    found = [Path(line) for line in done.stdout.splitlines()]
    return sorted((p for p in found if tests or p.parts[0] != "tests"), key=place)


def texts(tests: bool = False) -> Iterator[str]:
    """Each file, under a line with its name."""
    for path in files(tests):
        text = (ROOT / path).read_text(encoding="utf-8", errors="replace")
        yield f"===== {path.as_posix()} =====\n{text.rstrip()}\n\n"


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.onetext", description=__doc__.split("\n\n")[0])
    p.add_argument("--tests", action="store_true", help="the tests as well")
    args, size = p.parse_args(argv), 0
    for text in texts(tests=args.tests):
        size += sys.stdout.write(text)
    print(f"{size:,} characters, some {size // 4:,} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
