"""One run on many meshes and numbers of processes: the same losses; and moving between them in the middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT, write_own_sources

pytestmark = pytest.mark.slow
STEPS = 50
CONFIG = """
dtype: float32
model: {depth: 2, width: 64, head_dim: 16, sequence_len: 64}
tokenizer: {vocab_size: 512, sample_chars: 100000}
data: {dir: %s, cache_dir: %s, pack_buffer: 20, pack_workers: 0}
base: {tokens: %d, batch_tokens: 1024, micro_batch: 16, eval_every: 25, eval_tokens: 2048, save_every: 1000,
       core_every: 0, optim: {lr_scale: 0.5}}
mid: {max_rows: 64, micro_batch: 16, eval_every: 0}
"""
WITH_MID = "tokenizer,base,mid"
MESHES = {"data": "-1,1,1", "data-fsdp": "4,2,1", "data-fsdp-tensor": "2,2,2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a configuration; all runs share its tokenizer and its packed rows."""
    folder = tmp_path_factory.mktemp("meshes")
    write_own_sources(folder / "data")
    (folder / "tiny.yaml").write_text(CONFIG % (folder / "data", folder / "cache", STEPS * 1024))
    return folder


def start(place, run_dir, mesh="-1,1,1", *, devices=1, processes=1, stages="tokenizer,base") -> list[subprocess.Popen]:
    """The processes of a run, each with `devices` simulated devices."""
    sizes = [f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh.split(","))]
    command = [sys.executable, "run_speedrun.py", "--config", str(place / "tiny.yaml"), "--run-dir", str(run_dir)]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = []
    for i in range(processes):
        several = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        out.append(
            subprocess.Popen(
                [*command, "--stages", stages, *sizes],
                cwd=ROOT,
                env={**env, **(several if processes > 1 else {})},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return out


def finish(processes, code=0) -> None:
    for process in processes:
        err = process.communicate(timeout=300)[1]
        assert process.returncode == code, err[-3000:]


def records(run_dir, stage) -> list[dict]:
    path = run_dir / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def curve(run_dir, name="loss", stage="base") -> np.ndarray:
    return np.array([r[name] for r in records(run_dir, stage) if name in r])


@pytest.fixture(scope="module")
def one(place):
    finish(start(place, place / "one", stages=WITH_MID))
    losses = curve(place / "one")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.7
    return place / "one"


def same_losses(got, want) -> None:
    np.testing.assert_allclose(curve(got), curve(want), rtol=1e-5)
    np.testing.assert_allclose(curve(got, "val_bpb"), curve(want, "val_bpb"), rtol=1e-5)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_eight_devices_train_as_one(place, one, mesh, tmp_path):
    finish(start(place, tmp_path / "run", mesh, devices=8))
    same_losses(tmp_path / "run", one)


def test_two_processes_train_as_one(place, one, tmp_path):
    finish(start(place, tmp_path / "run", devices=4, processes=2, stages=WITH_MID))
    same_losses(tmp_path / "run", one)
    mid = curve(one, stage="mid")
    assert len(mid) >= 3
    # it begins from parameters that rounding has moved apart in the stage before
    np.testing.assert_allclose(curve(tmp_path / "run", stage="mid"), mid, rtol=1e-4)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"base {STEPS}/{STEPS}  loss") == 1, "only process 0 logs"


def stop_at(place, run_dir, step, which=0, **settings) -> None:
    """Starts a run and asks process `which` to stop, in the middle."""
    processes = start(place, run_dir, **settings)
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        if (run_dir / "base" / "metrics.jsonl").is_file() and len(curve(run_dir)) >= step:
            break
        time.sleep(0.01)
    processes[which].send_signal(signal.SIGTERM)
    finish(processes, code=75)


def test_from_two_processes_to_a_mesh_to_one_device(place, one, tmp_path):
    run = tmp_path / "run"
    stop_at(place, run, 5, which=1, devices=4, processes=2)
    first = len(curve(run))
    stop_at(place, run, first + 5, devices=8, mesh="2,2,2")
    assert 5 <= first < len(curve(run)) < STEPS
    finish(start(place, run))
    same_losses(run, one)
