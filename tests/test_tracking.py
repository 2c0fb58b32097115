"""Records of a stage: metrics.jsonl, log.txt, plain lines; and stopping by signals."""

import json
import os
import signal
import threading

import pytest

from nanochat_jax.devices import bandwidth, peak_flops
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, claim, read_json
from nanochat_jax.preemption import Stop
from nanochat_jax.tracking import RunLog, Tracker, peak_memory_gb, system_info, truncate_from


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path)


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]


def test_records_are_json_and_lines_are_plain(tmp_path, log, capsys):
    tracker = Tracker(tmp_path, "base", 3, log)
    for step in (1, 2, 3):
        tracker.record(step, loss=2.0 / step, grad_norm=float("inf"), tokens_per_second=1234.5, mfu=0.5)
    tracker.record(3, val_bpb=1.25)
    tracker.close()
    got = rows(tmp_path)
    assert [r["step"] for r in got] == [1, 2, 3, 3] and got[0]["grad_norm"] is None and got[3]["val_bpb"] == 1.25
    said = capsys.readouterr()
    assert said.out == ""  # stdout belongs to the result
    assert "base 3/3  loss 0.6667  1,234 tok/s  MFU 50.0 %" in said.err and "base 3/3  val_bpb 1.2500" in said.err
    assert "loss 0.6667" in log.path.read_text()


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path, log):
    tracker = Tracker(tmp_path, "base", 9, log)
    for step in range(1, 6):
        if step == 3:
            tracker.record(2, val_bpb=1.0)
        tracker.record(step, loss=1.0)
    tracker.close()
    with open(tmp_path / "base" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')  # killed while writing
    Tracker(tmp_path, "base", 9, log, start=2).close()
    # step 2 was saved before its evaluation, which is made again
    assert [(r["step"], "loss" in r) for r in rows(tmp_path)] == [(1, True), (2, True)]
    truncate_from(tmp_path / "nosuch.jsonl", 1)


def test_stop_takes_the_first_signal_and_gives_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    entered = []
    thread = threading.Thread(target=lambda: entered.append(Stop().__enter__()))
    thread.start()
    thread.join()
    assert entered and not entered[0].requested


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "a" / "x.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic_write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and list(path.parent.iterdir()) == [path]
    assert read_json(tmp_path / "none.json") is None
    path.write_text("{")
    with pytest.raises(UserError, match="remove it"):
        read_json(path)
    claim(tmp_path / "lock").close()


def test_devices_and_system():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and bandwidth("NVIDIA H200") == 4.8e12
    assert peak_flops("cpu") is None and bandwidth("NVIDIA GeForce GTX 1050") is None
    assert 0.05 < peak_memory_gb() < 100
    assert {"cpu", "cores", "memory_gb", "devices", "commit"} <= set(system_info())
