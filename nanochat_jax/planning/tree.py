"""Which code a run's figures are of."""

import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("*.py", "nanochat_jax/*.yaml")  # also below; the settings of a run are its own
NOTHING = "-"


def git(*args: str, **more: str) -> str:
    """What git says of the checkout; NOTHING outside of one, or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, *args], capture_output=True, text=True, check=True, env=os.environ | more
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return NOTHING


def tree() -> str:
    """The hash of the checkout's code as it stands, made in an index of its own; NOTHING as above."""
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        git("add", "--all", "--", *CODE, GIT_INDEX_FILE=index)
        return git("write-tree", GIT_INDEX_FILE=index)[:12]
