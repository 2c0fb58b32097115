"""Two processes of four devices each share a folder; what they save one process restores, and the reverse."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from checkpoint_hosts import place, same, state_of

from conftest import ROOT
from nanochat_jax.checkpoint import Checkpointer, saved_steps
from nanochat_jax.config import CheckpointConfig, MeshConfig
from nanochat_jax.mesh import sharding

HERE = Path(__file__).resolve().parent


def flip_values(checkpoint: Path) -> None:
    """One bit in the middle of the file that holds the arrays."""
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(folder, what process 0 found, what process 1 found)"""
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    folder = tmp_path_factory.mktemp("hosts")
    checkpointer = Checkpointer(folder / "one", CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        checkpointer.save(step, place(state_of(step), sharding.make_mesh(MeshConfig(1, 8, 1))), {"step": step})
    checkpointer.close()
    for copy in ("damaged", "unreadable"):
        shutil.copytree(folder / "one", folder / copy)
    flip_values(folder / "damaged" / "3")
    (folder / "damaged" / "2" / "meta" / "metadata").unlink()
    (folder / "file").touch()
    held = Checkpointer(folder / "held")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "checkpoint_hosts.py"), str(folder), port, str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [p.communicate(timeout=180) for p in processes]
    finally:
        for p in processes:
            p.kill()
    held.close()
    for p, (_, err) in zip(processes, said):
        assert p.returncode == 0, err[-3000:]
    return folder, *(json.loads(out.splitlines()[-1]) for out, _ in said)


def test_two_processes_save_and_restore_onto_two_meshes(found):
    for host in found[1:]:
        assert host["devices"] == [8, 4] and host["empty"] is None and host["saved"] == [2, 3]
        assert host["two"] == [[3, True, []]] * 2


@pytest.mark.parametrize("devices", [1, 8])
def test_what_two_processes_saved_one_restores(found, devices):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    checkpointer = Checkpointer(found[0] / "two")
    state, meta = checkpointer.restore(sharding.abstract(state_of(0), mesh))
    checkpointer.close()
    assert meta == {"step": 3} and same(state, state_of(3))


def test_what_one_process_saved_two_restore(found):
    assert all(host["one"] == [[3, True, []]] * 2 for host in found[1:])


def test_both_take_the_one_before_damage_and_one_of_them_says_so(found):
    folder, zero, one = found
    assert zero["damaged"][:2] == one["damaged"][:2] == [1, True]
    told = zero["damaged"][2]
    assert len(told) == 2 and "checkpoint 3" in told[0] and "checkpoint 2" in told[1] and one["damaged"][2] == []
    assert saved_steps(folder / "damaged") == [1] and (folder / "damaged" / "3.damaged").is_dir()


def test_what_one_host_cannot_read_neither_takes(found):
    _, zero, one = found
    assert one["unreadable on one host"] == [2, True, []]
    assert zero["unreadable on one host"][:2] == [2, True]
    assert "another host cannot read it" in zero["unreadable on one host"][2][0]


def test_a_directory_that_process_0_cannot_have_is_refused_on_both(found):
    _, zero, one = found
    assert "another process is writing" in zero["held"] and "could not be written" in zero["no folder"]
    assert one["held"] == one["no folder"] == "another host failed; it says why"


def test_a_signal_to_one_stops_both_at_the_same_step(found):
    _, zero, one = found
    assert zero["signals"] == {"stopped": 5, "due": [2], "why": "a signal to another host"}
    assert one["signals"] == {"stopped": 5, "due": [2], "why": "SIGUSR1"}


def test_the_clock_of_process_0_saves_on_both(found):
    _, zero, one = found
    steps, on_disk = zero["by time"]
    assert zero["by time"] == one["by time"] and steps == on_disk and len(steps) >= 2
    assert len(steps) == len(set(steps))  # asked for once, saved once
