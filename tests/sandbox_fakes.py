"""What the tests of the sandbox share."""

import os
from pathlib import Path

import pytest

from evals.sandbox.pool import Pool
from nanochat_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MODES = {"full": (), "seccomp only": ("namespaces",), "neither": ("namespaces", "seccomp")}


def open_pool(mode: str = "full") -> Pool:
    """A pool with these layers; skips the test where the machine lacks one of them."""
    if mode == "full":
        pool = Pool("required")
        try:
            pool.prepare()
        except UserError as e:
            pytest.skip(str(e))
        return pool
    pool = Pool(without=MODES[mode], log=lambda line: None)
    pool.prepare()
    if set(pool.missing) != set(MODES[mode]):
        pool.close()
        pytest.skip(f"this machine lacks more: {pool.missing}")
    return pool


def processes_with(text: str) -> dict[int, str]:
    """{process id: command line} of all that run and have the text in their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found[int(entry.name)] = line
    return found
