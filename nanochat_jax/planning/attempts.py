"""One number for the working tree as it is, and a log of such numbers: what to keep when many things are tried.

A line of log.tsv is an attempt: when, commit, tree (the hash of the code as it stood, and of the settings), minutes,
seed, what was changed, bits per byte, tokens, tokens/s and the verdict. An attempt on a tree that the log has already
takes the next seed. How far apart seeds of one tree lie says what chance does. Attempts of other minutes do not count.
"""

import csv
import io
import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from scipy.special import stdtrit

from nanochat_jax.config import RunConfig, fingerprint
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_text
from nanochat_jax.planning.runs import base_result, point, probe, speed, train
from nanochat_jax.planning.tree import NOTHING, ROOT, git, tree

LOG = "log.tsv"
FIELDS = ("when", "commit", "tree", "minutes", "seed", "change", "val_bpb", "tokens", "tokens_per_second", "verdict")
SURE = 0.95  # of the interval, Student's, beyond which a difference is no chance


def attempt(config: RunConfig, out: Path, minutes: float, change: str) -> dict:
    """Trains `config`'s base model for so many minutes of steps; returns its line, which the log in `out` then has."""
    commit, files = git("rev-parse", "--short", "HEAD"), tree()
    if files == NOTHING:
        raise UserError(
            f"an attempt is known by git's hash of the files, and {ROOT} is not a checkout, or git is missing"
        )
    of = f"{files}-{fingerprint(config)[:6]}"
    lines, length = read(out / LOG), f"{minutes:g}"
    earlier = [row for row in lines if row["minutes"] == length]
    seed = sum(row["tree"] == of for row in earlier)
    for name in ("probe", "attempt"):  # of another tree
        shutil.rmtree(out / name, ignore_errors=True)
    run = probe("probe", config)
    _trained(run, out)
    rate = speed(out / run.name)
    run = point("attempt", config, 60 * minutes * rate, seed)
    _trained(run, out)
    found = base_result(out / run.name)
    numbers = (round(found.bpb, 5), found.tokens, round(found.tokens / found.seconds))
    change = " ".join(change.split()) or git("log", "-1", "--format=%s")
    row = dict(zip(FIELDS, (time.strftime("%F %R"), commit, of, length, seed, change, *numbers), strict=False))
    row["verdict"] = verdict(row, earlier)
    _write(out / LOG, [*lines, row])
    return row


def _trained(run, out: Path) -> None:
    if train([run], out, keep=False):
        raise UserError(f"training failed; {out / run.name / 'log.txt'} says why")


def verdict(row: dict, earlier: Sequence[dict]) -> str:
    """What a new line says beside the best tree before it."""
    by_tree = defaultdict(list)
    for other in (*earlier, row):
        by_tree[other["tree"]].append(float(other["val_bpb"]))
    others = {tree: values for tree, values in by_tree.items() if tree != row["tree"]}
    if not others:
        return "the first tree" if not earlier else "another seed of the first tree"
    best, mine = min(others.values(), key=statistics.fmean), by_tree[row["tree"]]
    change = statistics.fmean(mine) - statistics.fmean(best)
    said = f"{change:+.4f} to the best before"
    repeated = [values for values in by_tree.values() if len(values) > 1]
    if not repeated:
        return f"{said}; what chance does is not known: repeat an attempt"
    free = sum(len(values) - 1 for values in repeated)
    deviation = math.sqrt(sum((len(v) - 1) * statistics.variance(v) for v in repeated) / free)
    error = deviation * math.sqrt(1 / len(mine) + 1 / len(best))
    surely = abs(change) > error * stdtrit(free, (1 + SURE) / 2)
    kind = "within chance" if not surely else "better" if change < 0 else "worse"
    return f"{kind}: {said}, standard error {error:.4f}"


def read(path: Path) -> list[dict]:
    """The lines of a log; none where there is none. UserError where the file is another thing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if rows and tuple(rows[0]) != FIELDS:
        raise UserError(f"{path} is not a log of attempts; move it away, or take another --out")
    return rows


def _write(path: Path, rows: Sequence[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
