"""The cache of downloads and packed rows, where it cannot be written to or its disk is too small."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.errors import UserError

ELSEWHERE = "make room, or name another folder by data.cache_dir (--to of the download command)"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """UserError where the disk is full, or nobody may write there."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror or e}); {ELSEWHERE}") from None


def check_space(folder: Path, needed: int, what: str, advice: str = ELSEWHERE) -> None:
    """Makes a folder. UserError, which begins with `what`, where `needed` bytes do not fit on its disk."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if needed > free:
        disk = f"the disk of {folder} has {free / 1e9:.2f} GB free"
        raise UserError(f"{what} {needed / 1e9:.2f} GB, and {disk}; {advice}")
