"""What is in a run's checkpoints.

    python -m nanochat_jax.checkpoint ls DIR        when each was saved, its size and metrics, and whether it is whole
    python -m nanochat_jax.checkpoint show DIR      the metadata and arrays of one, by default the newest
    python -m nanochat_jax.checkpoint verify DIR    reads every array and compares checksums; exits with 1 on damage

DIR is a run, one of its stages or one checkpoint; the run's configuration is not needed. `--json` prints one JSON line.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from nanochat_jax.checkpoint import Damaged, store
from nanochat_jax.cli import command
from nanochat_jax.errors import UserError
from nanochat_jax.rules import STAGES

NAME = re.compile(r"(\d+)(\.damaged|\.orbax-checkpoint-tmp.*)?")
METRICS = ("pass@1", "reward", "loss", "val_bpb")  # ls has room for the first two that there are


def find(directory: Path) -> list[dict]:
    """The checkpoints of a run, stage by stage, of a stage or its folder `checkpoints`, or the one that it is."""
    folders = [p for pattern in ("*", "checkpoints/*", "*/checkpoints/*") for p in directory.glob(pattern)]
    found = []
    for path in [p for p in folders if p.is_dir() and NAME.fullmatch(p.name)] or [directory]:
        if path.is_dir() and (name := NAME.fullmatch(path.name)):
            with contextlib.suppress(FileNotFoundError):  # a run in progress has just removed it
                found.append(examine(path, *name.groups()))
    if not found:
        raise UserError(f"no checkpoint in {directory}; give a run directory, a stage of one or a checkpoint folder")
    order = {stage: i for i, stage in enumerate(STAGES)}
    return sorted(found, key=lambda c: (order.get(c["stage"], len(STAGES)), c["stage"], c["step"], c["path"]))


def examine(path: Path, step: str, suffix: str | None) -> dict:
    """What is found without reading an array. state: whole, damaged, half-written (being saved, or killed), set aside.

    saved: when Orbax finished it; else when its folder changed last. bytes: of all its files.
    """
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    state, reason = "whole", None
    meta: dict = {}
    try:
        _, meta = store.read_records(path)
        store.check_files(path)
    except Damaged as e:
        state, reason = "damaged", str(e)
    if suffix:
        state = "set aside" if suffix == ".damaged" else "half-written"
    try:
        seconds = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        seconds = path.stat().st_mtime
    return {
        "stage": (path.parent.parent if path.parent.name == "checkpoints" else path.parent).name,
        "step": int(step),
        "saved": datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds"),
        "bytes": size,
        "state": state,
        "reason": reason,
        "meta": meta,
        "path": str(path),
    }


def ls(console: Console, found: list[dict]) -> dict:
    table = _table("stage", "step", "saved", "size", "last metrics", "state")
    for c in found:
        last = c["meta"].get("last", {})
        metrics = [f"{m} {last[m]:.4f}" for m in METRICS if isinstance(last.get(m), (int, float))]
        row = (c["stage"], str(c["step"]), c["saved"][:-3], decimal(c["bytes"]), "  ".join(metrics[:2]))
        table.add_row(*row, _styled(c["state"]))
    console.print(table)
    for c in found:
        if c["state"] == "damaged":
            console.print(f"{c['stage']} {c['step']}: {c['reason']}", soft_wrap=True)
    return {"checkpoints": found}


def show(console: Console, found: list[dict]) -> dict:
    c = next((c for c in reversed(found) if c["state"] in ("whole", "damaged")), found[-1])
    if c["state"] != "whole":
        raise UserError(f"{c['path']} is {c['state']}{': ' + c['reason'] if c['reason'] else ''}")
    groups = grouped(store.read_records(Path(c["path"]))[0])
    parameters = sum(g["count"] * math.prod(g["shape"]) for g in groups if g["name"].startswith("params/"))
    record = Table.grid("key", Column(overflow="fold"), padding=(0, 2))
    known = {"path": c["path"], "saved": c["saved"], "size": decimal(c["bytes"]), "parameters": f"{parameters:,}"}
    for key, value in {**known, **c["meta"]}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        record.add_row(key, f"{value:.1f}" if isinstance(value, float) else str(value))
    console.print(record, "")
    table = _table("array", "count", "shape", "type", "size")
    for top, of in itertools.groupby(groups, lambda g: g["name"].split("/")[0]):
        members = list(of)
        for g in members:
            name = re.sub("/inner_states?(?=/)", "", g["name"])  # where optax keeps what it has partitioned
            shape = " x ".join(map(str, g["shape"])) or "scalar"
            table.add_row(name, str(g["count"]), shape, g["dtype"], decimal(g["bytes"]))
        if len(members) > 1:
            count, size = (sum(g[key] for g in members) for key in ("count", "bytes"))
            table.add_row(f"all of {top}", str(count), "", "", decimal(size), style="bold")
    console.print(table)
    return {**c, "parameters": parameters, "arrays": groups}


def grouped(arrays: dict) -> list[dict]:
    """Arrays whose names differ only in numbers, which become *, and that are alike: one line for all layers."""
    groups: dict = {}
    for name, a in arrays.items():
        key = (re.sub(r"(?<=/)\d+(?=/|$)", "*", name), tuple(a["shape"]), a["dtype"])
        group = groups.setdefault(key, {"name": key[0], "shape": a["shape"], "dtype": key[2], "count": 0, "bytes": 0})
        group["count"] += 1
        group["bytes"] += store.array_bytes(a)
    return list(groups.values())


def verify(console: Console, found: list[dict]) -> dict:
    finished = [c for c in found if c["state"] in ("whole", "damaged")]
    if not finished:
        raise UserError("there is nothing to verify: no checkpoint here was finished")
    for c in found:
        path, began, said = Path(c["path"]), time.perf_counter(), ""
        try:
            if c in finished:
                c["arrays"], size = store.verify(path)
                said = f"{c['arrays']} arrays, {decimal(size)}, {time.perf_counter() - began:.1f} s"
        except Damaged as e:
            c["state"], c["reason"] = ("damaged", str(e)) if path.exists() else ("removed", None)
            said = c["reason"] or "by a run in progress"
        console.print(f"{c['stage']:>5} {c['step']:>7} ", _styled(c["state"]), "", said, soft_wrap=True)
    return {"damaged": sum(c["state"] == "damaged" for c in found), "checkpoints": found}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = name in ("step", "size", "count", "shape", "type")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "array", overflow="fold")
    return table


def _styled(state: str) -> Text:
    return Text(state, {"whole": "green", "damaged": "bold red"}.get(state, "yellow"))


@command
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.checkpoint", description=__doc__.split("\n\n")[0])
    p.add_argument("command", choices=("ls", "show", "verify"))
    p.add_argument("directory", metavar="DIR", type=Path, help="a run, a stage of one, or one checkpoint")
    p.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    args = p.parse_args(argv)
    console = Console(highlight=False, markup=False, quiet=args.json)
    result = {"ls": ls, "show": show, "verify": verify}[args.command](console, find(args.directory.absolute()))
    if args.json:
        print(json.dumps(result))
    return 1 if result.get("damaged") else 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # beside a run that has the accelerator's memory
    sys.exit(main())
