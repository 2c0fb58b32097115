"""Everything that is measured on a machine, one after the other, within a few minutes; results as they come.

    python -m nanochat_jax.bench suite --minutes 8 --out results --reference DIR --reference-python ENV/bin/python
    python -m nanochat_jax.bench suite --list

Each entry is a command of its own, so that what one breaks the others do not feel. An entry that would not end in time
is left out and named. `results/results.jsonl` has a line for each: the command, how it ended, its last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One command: arguments of `python -m nanochat_jax.bench`, and the seconds that it takes at most."""

    name: str
    command: str
    seconds: float
    races: bool = False  # takes the reference, where it is at hand
    flags: str = ""  # of XLA, to be tried


D12 = "train --depth 12 --rows 16 --seq 2048 --accumulation 4 --rounds 3"
GPU = (  # in the order of what is wanted most; the first compiles cold, so that start-up is seen
    Entry("d12", D12 + " --startup --profile {out}/d12", 150),
    Entry("d12 fp8", D12 + " --precision fp8", 60),
    Entry("d24", "train --depth 24 --rows 8 --seq 2048 --accumulation 4 --rounds 3 --profile {out}/d24", 150),
    Entry("d24 fp8", "train --depth 24 --rows 8 --seq 2048 --accumulation 4 --rounds 3 --precision fp8", 150),
    Entry("decode d20", "decode --depth 20 --seq 2048 --prompt 1792 --new 256 --batch 1,32 --rounds 2", 120, True),
    Entry("race d12 L", "train --depth 12 --rows 8 --seq 2048 --accumulation 4 --pattern L --rounds 3", 150, True),
    Entry("ops d24", "ops --depth 24 --rows 8 --seq 2048", 60),
    Entry("ops d24 fp8", "ops --depth 24 --rows 8 --seq 2048 --precision fp8 --only product,loss", 40),
    Entry("d20", "train --depth 20 --rows 8 --seq 2048 --accumulation 4 --rounds 3 --startup", 200),
    Entry("race d20 L", "train --depth 20 --rows 4 --seq 2048 --accumulation 4 --pattern L --rounds 3", 200, True),
    Entry("decode d20 int8", "decode --depth 20 --seq 2048 --prompt 1792 --new 256 --batch 1,32 --rounds 2 --int8", 90),
    Entry("d12 no triton", D12, 60, flags="--xla_gpu_enable_triton_gemm=false"),
    Entry("d12 command buffers", D12, 60, flags="--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"),
)
CPU = (
    Entry("d4", "train --depth 4 --rows 8 --seq 512 --rounds 5 --startup --profile {out}/d4", 300, True),
    Entry("d6", "train --depth 6 --rows 8 --seq 512 --rounds 3 --steps 2", 400, True),
    Entry("ops d4", "ops --depth 4 --rows 8 --seq 512", 60),
    Entry("decode d4", "decode --depth 4 --batch 1,8 --rounds 3", 240, True),
)


def run(entry: Entry, out: Path, reference: list[str], timeout: float) -> dict:
    """Runs an entry, its output shown and kept; its record."""
    command = [sys.executable, "-m", "nanochat_jax.bench", *shlex.split(entry.command.format(out=out))]
    command += reference if entry.races else []
    began, record = time.perf_counter(), {"name": entry.name, "command": shlex.join(command[3:]), "result": None}
    record |= {"flags": entry.flags} if entry.flags else {}
    env = dict(os.environ)
    if entry.flags:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {entry.flags}".strip()
    with tempfile.TemporaryFile("w+") as said:  # a session of its own, so that it ends with all of its workers
        pipes = {"stdout": said, "stderr": subprocess.STDOUT, "env": env}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        try:
            record["ended"] = f"status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            record["ended"] = f"stopped after {timeout:.0f} s"
        said.seek(0)
        lines = said.read().splitlines()
    record["seconds"] = round(time.perf_counter() - began, 1)
    if process.returncode == 0:
        record["result"] = json.loads(lines.pop())
    print("\n".join(lines), flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    from nanochat_jax.bench import race

    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench suite", description=__doc__.split("\n\n")[0])
    p.add_argument("--minutes", type=float, default=8, help="a CPU beside the reference wants 17")
    p.add_argument("--out", default="bench", help="a folder for results and traces")
    p.add_argument("--only", default="", help="entries whose names begin so, several after commas")
    p.add_argument("--list", action="store_true", help="say what would run")
    race.add_reference(p)
    args = p.parse_args(argv)
    entries = [e for e in (GPU if on_gpu() else CPU) if e.name.startswith(tuple(args.only.split(",")))]
    if args.list:
        print("\n".join(f"{e.name:16} at most {e.seconds:4.0f} s  {e.command}" for e in entries))
        return 0
    out, end = Path(args.out), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    reference = []
    if args.reference:
        reference = ["--reference", args.reference, "--reference-python", args.reference_python]
    failed = 0
    with open(out / "results.jsonl", "a", encoding="utf-8") as results:
        for entry in entries:
            left = end - time.monotonic()
            if left < entry.seconds:
                print(f"{entry.name}: left out, {left:.0f} s are left and it may take {entry.seconds:.0f}", flush=True)
                continue
            print(f"— {entry.name}", flush=True)
            record = run(entry, out, reference, entry.seconds)
            failed += record["result"] is None
            print(f"{entry.name}: {record['ended']}, {record['seconds']:.0f} s", flush=True)
            results.write(json.dumps(record) + "\n")
            results.flush()
    return 1 if failed else 0


def on_gpu() -> bool:
    """Asked in a process of its own: this one must not take the memory that the entries need."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() == "gpu"
