"""Kills training at random moments, starts it again, and compares its end, bit for bit, with a run left alone.

    uv run python tests/kill_runs.py --runs 60 --seed 0 --devices 1,8

Every run packs its data and trains with a checkpoint every other step, so that a moment at random often falls into a
save or into the packing; sometimes it is the packer that is killed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
KILLS = 3  # of one run at most; then it is let go to its end
CONFIG = """
model: {depth: 2, width: 32, head_dim: 16, sequence_len: 32}
tokenizer: {vocab_size: 600, sample_chars: 200000}
data: {dir: %s, cache_dir: %s, pack_buffer: 50, pack_workers: 2}
base: {tokens: %d, batch_tokens: 512, micro_batch: 2, eval_every: 10, eval_tokens: 1024, save_every: 2, core_every: 0}
tracking: {samples: 0}
"""


def write_data(folder: Path) -> None:
    """Parquet shards of Python's own sources: some megabytes, whose packing takes a while and fills several shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "pretrain").mkdir(parents=True)
    texts = [p.read_text(errors="replace") for p in sorted(Path(os.__file__).parent.glob("*.py"))]
    for i in range(4):
        table = pa.table({"text": texts[i::4]})
        pq.write_table(table, folder / "pretrain" / f"shard_{i}.parquet", row_group_size=8)


class Trial:
    """One run directory with its own cache, but for compiled programs, which all runs share."""

    def __init__(self, folder: Path, name: str, devices: int, steps: int):
        self.dir, self.cache, self.devices = folder / name, folder / f"{name}.cache", devices
        self.cache.mkdir()
        (folder / "compiled").mkdir(exist_ok=True)
        (self.cache / "compiled").symlink_to(folder / "compiled")
        self.config = folder / f"{name}.yaml"
        self.config.write_text(CONFIG % (folder / "data", self.cache, steps * 512))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "run_speedrun.py", "--config", str(self.config), "--run-dir", str(self.dir)]
        flags = f"--xla_force_host_platform_device_count={self.devices}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        with open(self.dir.with_suffix(".err"), "a") as err:
            return subprocess.Popen(
                [*command, "--stages", "tokenizer,base"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=err
            )

    def result(self) -> dict:
        """What must be equal: hashes of the parameters, checksums of the whole state and of the rows, the losses."""
        import jax
        from flax import nnx

        from nanochat_jax.checkpoint import load_model, saved_steps

        loaded = load_model(self.dir, "base")
        digest = hashlib.sha256()
        for path, x in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.split(loaded.model)[1]))[0]:
            digest.update(jax.tree_util.keystr(path).encode() + jax.device_get(x).tobytes())
        newest = self.dir / "base" / "checkpoints" / str(saved_steps(self.dir / "base" / "checkpoints")[-1])
        manifests = sorted((self.cache / "packed").glob("*/manifest.json"))
        lines = (self.dir / "base" / "metrics.jsonl").read_text().splitlines()
        timing = ("time", "tokens_per_second", "mfu", "memory_gb")
        return {
            "step": loaded.step,
            "parameters": digest.hexdigest(),
            "state": (newest / "arrays" / "metadata").read_text(),
            "rows": [[s["checksum"] for s in json.loads(m.read_text())["shards"]] for m in manifests],
            "records": [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines],
        }


def kill_one(process: subprocess.Popen, rng: random.Random) -> str:
    """SIGKILL to the run, or, one time in four, to one of its packing processes. Who it was."""
    try:
        helpers = [p for p in psutil.Process(process.pid).children(recursive=True) if "python" in p.name()]
        victim = rng.choice(helpers) if helpers and rng.random() < 0.25 else None
        (victim or process).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return "nobody"
    return "packer" if victim else "run"


def moment(trial: Trial) -> str:
    """What a run was at when it was killed, by what it had left behind."""
    base = trial.dir / "base" / "checkpoints"
    if base.is_dir() and any("tmp" in p.name for p in base.iterdir()):
        return "saving"
    if base.is_dir() and any(p.name.isdecimal() for p in base.iterdir()):
        return "training"
    if (trial.cache / "packed").is_dir():
        return "packing or compiling"
    return "starting"


def killed(trial: Trial, rng: random.Random, seconds: float, say) -> list[str]:
    """Runs a trial to its end through up to KILLS kills; at which moments they came. RuntimeError where it fails."""
    moments = []
    while True:
        process = trial.start()
        if len(moments) < rng.randint(1, KILLS):
            try:
                process.wait(timeout=rng.uniform(0.2, seconds))
            except subprocess.TimeoutExpired:
                who = kill_one(process, rng)
                moments.append(f"{moment(trial)} ({who})")
        code = process.wait(timeout=300)
        if code == 0:
            return moments
        if code not in (-signal.SIGKILL, 2, 75) or (code != -signal.SIGKILL and not moments):
            raise RuntimeError(
                f"{trial.dir.name} ended with {code}: {trial.dir.with_suffix('.err').read_text()[-2000:]}"
            )
        say(f"  {trial.dir.name}: killed {moments[-1]}, exit {code}")


def campaign(folder: Path, runs: int, seed: int, devices: list[int], steps: int = 24, say=print) -> dict:
    """{"runs", "kills", "differing", ...}; runs are spread over the numbers of devices."""
    write_data(folder / "data")
    whole, seconds = {}, {}
    for count in devices:
        trial = Trial(folder, f"whole{count}", count, steps)
        for attempt in (trial, Trial(folder, f"again{count}", count, steps)):  # the second finds its programs compiled
            began = time.perf_counter()
            if attempt.start().wait() != 0:
                raise RuntimeError(attempt.dir.with_suffix(".err").read_text()[-2000:])
            seconds[count] = time.perf_counter() - began
        whole[count] = trial.result()
        if attempt.result() != whole[count]:
            raise RuntimeError(f"two runs that nobody killed differ on {count} devices")
        say(f"left alone on {count} devices: {seconds[count]:.1f} s, {len(whole[count]['records'])} records")
    moments, differing = Counter(), []
    for i in range(runs):
        count, rng = devices[i % len(devices)], random.Random(f"{seed} {i}")
        trial = Trial(folder, f"run{i}", count, steps)
        found = killed(trial, rng, seconds[count], say)
        moments.update(found)
        got = trial.result()
        wrong = [k for k in got if got[k] != whole[count][k]]
        if wrong:
            differing.append([i, wrong])
        say(f"{i}: {count} devices, {len(found)} kills, {wrong or 'equal'}")
    return {
        "runs": runs,
        "seed": seed,
        "kills": sum(moments.values()),
        "moments": dict(moments),
        "differing": differing,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--runs", type=int, default=60)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--devices", default="1,8", help="simulated devices, over which the runs are spread")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        devices = [int(n) for n in args.devices.split(",")]
        result = campaign(
            Path(folder), args.runs, args.seed, devices, say=lambda t: print(t, file=sys.stderr, flush=True)
        )
    print(json.dumps(result))
    return 1 if result["differing"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
