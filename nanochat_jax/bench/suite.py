"""Everything that is measured on a machine, one after the other, within a few minutes; results as they come.

Each entry is a command of its own, so that a failure does not stop the others. On a GPU they first compile in parallel
and then take turns on the device; races, and everything on a CPU, run one by one. What would not end in time is left
out and named. results.jsonl in --out has a line for each: the command, how it ended, its last line of JSON.
"""

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

from nanochat_jax.bench import frame


@dataclass(frozen=True)
class Entry:
    """One command: arguments of `python -m nanochat_jax.bench`, and the seconds that it takes at most."""

    name: str
    command: str
    seconds: float
    races: bool = False  # takes the reference, where it is at hand
    flags: str = ""  # of XLA, to be tried


STEP = "train --seq 2048 --rows 16 --accumulation 4 --rounds 3 --steps 3"
RACE = STEP + " --pattern L"  # the reference has no kernel for windows where it cannot fetch FlashAttention 3
DECODE = "decode --depth 20 --seq 2048 --prompt 1792 --new 256 --batch 1,32 --rounds 2"
GPU = (  # in the order of what is wanted most
    Entry("d24", STEP + " --depth 24 --profile {out}/d24", 40),
    Entry("d24 fp8", STEP + " --depth 24 --precision fp8 --profile {out}/d24_fp8", 40),
    Entry("d12", STEP + " --depth 12 --profile {out}/d12", 30),
    Entry("race d12", RACE + " --depth 12", 30, True),
    Entry("decode d20", DECODE, 60, True),
    Entry("race d24", RACE + " --depth 24 --rows 8", 60, True),
    Entry("race d20", RACE + " --depth 20 --rows 8", 60, True),
    Entry("d20", STEP + " --depth 20 --startup", 90),
    Entry("decode d20 int8", DECODE + " --int8", 40),
    Entry("ops d24", "ops --depth 24 --rows 8 --seq 2048", 60),
    Entry("ops d24 fp8", "ops --depth 24 --rows 8 --seq 2048 --precision fp8 --only product,loss", 40),
    Entry("fp8 d12", STEP + " --depth 12 --precision fp8", 30),
    Entry("triton d12", STEP + " --depth 12", 150, flags="--xla_gpu_enable_triton_gemm=true"),
)
CPU = (
    Entry("d4", "train --depth 4 --rows 8 --seq 512 --rounds 5 --startup --profile {out}/d4", 300, True),
    Entry("d6", "train --depth 6 --rows 8 --seq 512 --rounds 3 --steps 2", 400, True),
    Entry("ops d4", "ops --depth 4 --rows 8 --seq 512", 60),
    Entry("decode d4", "decode --depth 4 --batch 1,8 --rounds 3", 240, True),
)


class Started:
    """An entry's process: it compiles, and waits for its turn (`frame.wait_for_turn`) where it has a file for that."""

    def __init__(self, entry: Entry, args: argparse.Namespace, turn: Path | None):
        self.entry, self._turn, env = entry, turn, dict(os.environ)
        words = shlex.split(entry.command.format(out=args.out))
        if entry.races and args.reference:
            words += ["--reference", args.reference, "--reference-python", args.reference_python]
        self.command = shlex.join(words)
        if entry.flags:
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {entry.flags}".strip()
        if turn:
            env |= {frame.TURN: str(turn), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read in `finish`)
        # a session of its own, so that it ends with all of its workers
        how: dict = {"stdin": subprocess.PIPE, "stdout": self._said, "stderr": subprocess.STDOUT, "text": True}
        how |= {"env": env, "start_new_session": True}
        self._process = subprocess.Popen([sys.executable, "-m", "nanochat_jax.bench", *words], **how)

    @property
    def compiled(self) -> bool:
        return self._turn is None or self._process.poll() is not None or self._turn.exists()

    def finish(self, timeout: float) -> dict:
        """Gives it its turn and waits for its end; its output is shown. Its record."""
        entry, began = self.entry, time.perf_counter()
        record: dict = {"name": entry.name, "command": self.command, "result": None}
        if entry.flags:
            record["flags"] = entry.flags
        print(f"— {entry.name}", flush=True)
        try:
            self._process.communicate("go\n", timeout)
            record["ended"] = f"status {self._process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            record["ended"] = f"stopped after {timeout:.0f} s"
        self._said.seek(0)
        lines = self._said.read().splitlines()
        record["seconds"] = round(time.perf_counter() - began, 1)
        if self._process.returncode == 0:
            record["result"] = json.loads(lines.pop())
        print("\n".join([*lines, f"{entry.name}: {record['ended']}, {record['seconds']:.0f} s"]), flush=True)
        return record


def waves(entries: Sequence[Entry], gpu: bool, reference: bool) -> list[list[Entry]]:
    """What compiles beside each other: on a GPU all but the races, as torch holds memory once it has compiled."""
    by_itself = [e for e in entries if not gpu or (e.races and reference)]
    return [[e for e in entries if e not in by_itself], *([e] for e in by_itself)]


def wait_for_compiled(started: Sequence[Started], end: float) -> None:
    """Returns when all have compiled beside each other, or half of the time to `end` is over."""
    began = time.monotonic()
    while time.monotonic() < (began + end) / 2 and not all(s.compiled for s in started):
        time.sleep(0.1)
    late = ", ".join(s.entry.name for s in started if not s.compiled)
    print(f"compiled in {time.monotonic() - began:.0f} s" + (f", but for {late}" if late else ""), flush=True)


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--minutes", type=float, default=8, help="with the reference a GPU needs about 14, a CPU 17")
    p.add_argument("--out", default="bench", help="a folder for results and traces")
    p.add_argument("--only", default="", help="entries whose names begin like this, several after commas")
    p.add_argument("--list", action="store_true", help="say what would run")
    frame.add_reference(p)


def run(args: argparse.Namespace) -> None:
    gpu = on_gpu()
    entries = [e for e in (GPU if gpu else CPU) if e.name.startswith(tuple(args.only.split(",")))]
    if args.list:
        print("\n".join(f"{e.name:16} at most {e.seconds:4.0f} s  {e.command}" for e in entries))
        return
    out, end, failed = Path(args.out), time.monotonic() + 60 * args.minutes, 0
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "results.jsonl", "a", encoding="utf-8") as results, tempfile.TemporaryDirectory() as turns:
        for wave in waves(entries, gpu, bool(args.reference)):
            started, taken = [], 0.0
            for entry in wave:
                if (left := end - time.monotonic() - taken) < entry.seconds:
                    why = f"{left:.0f} s are left and it may take {entry.seconds:.0f}"
                    print(f"{entry.name}: left out, {why}", flush=True)
                    continue
                started.append(Started(entry, args, Path(turns, entry.name) if gpu else None))
                taken += entry.seconds
            if gpu:
                wait_for_compiled(started, end)
            for one in started:
                record = one.finish(min(one.entry.seconds, max(1, end - time.monotonic())))
                failed += record["result"] is None
                results.write(json.dumps(record) + "\n")
                results.flush()
    if failed:
        raise SystemExit(1)


def on_gpu() -> bool:
    """Asked in a process of its own: this one must not take the memory that the entries need."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() == "gpu"
