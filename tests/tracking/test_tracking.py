"""Records of a stage: metrics.jsonl, log.txt, plain lines; and stopping by signals."""

import json
import os
import signal
import struct
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import TrackingConfig
from nanochat_jax.devices import bandwidth, peak_flops
from nanochat_jax.errors import UserError
from nanochat_jax.files import atomic_write_json, claim, read_json
from nanochat_jax.mesh.preemption import Stop
from nanochat_jax.processes import peak_memory_gb
from nanochat_jax.tracking import sinks
from nanochat_jax.tracking.alarms import LEAST, LossAlarm, StallAlarm
from nanochat_jax.tracking.trace import traced
from nanochat_jax.tracking.tracking import RunLog, Tracker, system_info, truncate_from


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk(tmp_path, log, capsys, monkeypatch):
    """The log does without; a record that cannot be written is the stage's error, once, and names its file."""
    log.path.symlink_to("/dev/full")
    log.say("a")
    log.say("b")
    said = capsys.readouterr().err
    assert said.count("cannot write") == 1 and "No space left" in said and "a\n" in said and "b\n" in said
    monkeypatch.setattr("nanochat_jax.tracking.tracking.truncate_from", lambda path, step: [])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, "base", 9, log)
    with pytest.raises(OSError, match="metrics.jsonl"):
        tracker.record(1, loss=1.0)
    tracker._stalled("stall: of a thread, which has nobody to tell")
    tracker.close()


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
    with pytest.raises(UserError, match="mend it"):
        read_json(path)
    claim(tmp_path / "lock").close()


def test_devices_and_system():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and bandwidth("NVIDIA H200") == 4.8e12
    assert bandwidth("NVIDIA GH200 480GB") == 4.0e12 and peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("cpu") is None and bandwidth("NVIDIA GeForce GTX 1050") is None
    assert 0.05 < peak_memory_gb() < 100
    assert {"cpu", "cores", "memory_gb", "devices", "commit"} <= set(system_info())


def losses(n: int, level=3.0, noise=0.02, seed=0) -> list[float]:
    return list(level + noise * np.random.default_rng(seed).standard_normal(n))


def test_a_spike_is_said_once_and_a_plateau_becomes_the_new_normal():
    alarm = LossAlarm()
    calm, high = losses(200), losses(80, level=4.0, seed=1)
    assert not any(map(alarm.see, calm))
    said = [i for i, x in enumerate(high) if alarm.see(x)]
    assert said == [2]  # the third in a row
    said = [i for i, x in enumerate(losses(10, level=6.0, seed=2)) if alarm.see(x)]
    assert said == [2]


def test_what_is_no_spike():
    for calm in (
        losses(300),
        [9 - 6 * min(1, i / 40) for i in range(300)],  # falls fast, then stands still: no deviation at all
        [x + 3 * (i % 50 == 49) for i, x in enumerate(losses(300))],  # single odd batches
        [x + 3 * (i % 25 > 22) for i, x in enumerate(losses(300))],  # two in a row
        losses(LEAST - 3) + [9.0] * 3,  # too early to tell
    ):
        alarm = LossAlarm()
        assert [a for a in map(alarm.see, calm) if a] == []


def test_a_loss_that_is_no_number_is_said_and_not_remembered():
    alarm = LossAlarm(losses(100))
    assert alarm.see(float("nan")) == "the loss is nan" and alarm.see(float("inf")) == "the loss is inf"
    assert alarm.see(3.0) is None and [bool(alarm.see(5.0)) for _ in range(4)] == [False, False, True, False]


def test_a_run_taken_up_raises_the_same_alarms(tmp_path, log):
    """Killed after the first high loss, and trained on from a checkpoint before it or after it."""
    told, all_losses = [], [*losses(40), 5.0, 5.1, 5.2, 5.3]

    def train(start, stop):
        tracker = Tracker(tmp_path, "base", 44, log, start, TrackingConfig(), told.append)
        for step in range(start, stop):
            tracker.record(step + 1, loss=all_losses[step])
        tracker.close()

    train(0, 41)
    for start in (41, 38):
        train(start, 44)
        assert [r["step"] for r in rows(tmp_path) if "alarm" in r] == [43]
    assert len(told) == 2 and told[0] == told[1] and told[0].startswith("spike: 3 losses in a row above 3.")
    assert "base 43/44  ALARM  spike" in log.path.read_text()


def test_rl_has_no_level_to_leap_from(tmp_path, log):
    tracker = Tracker(tmp_path, "base", 99, log)
    for step, loss in enumerate([*losses(40, level=0.0, noise=1e-4), 0.5, 0.5, 0.5]):
        tracker.record(step, loss=loss, reward=0.5)
    tracker.close()
    assert not any("alarm" in r for r in rows(tmp_path))


def test_a_stall_is_said_once_and_evaluations_are_none():
    told = []
    alarm = StallAlarm(told.append, least=0.08)
    for _ in range(LEAST + 1):
        alarm.step()
    with alarm.elsewhere():
        time.sleep(0.3)
    assert told == []
    alarm.step()
    time.sleep(0.5)
    alarm.close()
    assert len(told) == 1 and told[0].startswith("stall: no step for 0 s")


def test_a_stalled_stage_has_a_record_of_it(tmp_path, log):
    tracker = Tracker(tmp_path, "base", 9, log)
    tracker.record(1, loss=1.0)
    tracker._stalled("stall: no step for 80 s, they take 2.0 s")
    tracker.close()
    assert [(r["step"], r.get("alarm", "")[:5]) for r in rows(tmp_path)] == [(1, ""), (1, "stall")]
    assert "ALARM  stall" in log.path.read_text()


def test_stop_can_be_asked_for():
    stop = Stop()
    stop.ask("spike")
    stop.ask("another")
    assert stop.agreed() == (True, False) and stop.why == "spike"


# ------------------------------------------------------------------------------------------------------ sinks


def events(folder) -> list:
    """(step, tag, value or None for a text) of the event files: records of length, checksum, bytes, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    out = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            out += [(event.step, v.tag, v.simple_value if v.HasField("simple_value") else None)
                    for v in event.summary.value]  # fmt: skip
            if event.HasField("session_log"):
                out.append((event.step, "purged", None))
    return out


def test_tensorboard_gets_the_records(tmp_path, log):
    pytest.importorskip("tensorboardX")
    config = TrackingConfig(tensorboard=True)
    tracker = Tracker(tmp_path, "base", 3, log, config=config)
    tracker.record(1, loss=2.0, mfu=None)
    tracker.record(1, val_bpb=1.5, sample="Once")
    tracker.close()
    found = events(tmp_path / "tensorboard" / "base")
    assert (1, "loss", 2.0) in found and (1, "val_bpb", 1.5) in found and (1, "sample/text_summary", None) in found
    assert {tag for _, tag, _ in found} == {"loss", "memory_gb", "val_bpb", "sample/text_summary"}
    Tracker(tmp_path, "base", 3, log, 1, config).close()
    assert (2, "purged", None) in events(tmp_path / "tensorboard" / "base")  # from step 2 on


class FakeWandB(types.ModuleType):
    """Takes what wandb.init would."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    def __init__(self, fails=False):
        super().__init__("wandb")
        self.fails, self.inits, self.logged, self.finished, self.Settings = fails, [], [], 0, dict

    def init(self, **how):
        if self.fails:
            raise self.errors.Error("no\nkey")
        self.inits.append(how)
        return self

    def define_metric(self, *names, **how):
        pass

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_records_of_all_stages_in_one_run(tmp_path, log, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for stage in ("base", "sft"):
        tracker = Tracker(tmp_path, stage, 3, log, config=TrackingConfig(wandb="mine"))
        tracker.record(1, loss=2.0, mfu=None)
        tracker.close()
    assert [i["project"] for i in fake.inits] == ["mine"] * 2 and fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.logged[0].items() >= {"base/step": 1, "base/loss": 2.0}.items() and "base/mfu" not in fake.logged[0]
    assert fake.logged[1]["sft/loss"] == 2.0 and fake.finished == 2
    (tmp_path / "wandb-id").unlink()  # the run directory was made anew
    sinks.open_sinks(TrackingConfig(wandb="mine"), tmp_path, "base", 0)
    assert fake.inits[2]["id"] != fake.inits[0]["id"]


def test_what_is_missing_for_a_sink_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    sinks.check(TrackingConfig())
    with pytest.raises(UserError, match="tracking.wandb needs the package wandb: uv sync --extra wandb"):
        sinks.check(TrackingConfig(wandb="mine"))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(fails=True))
    with pytest.raises(UserError, match="run `wandb login`, or set WANDB_MODE=offline"):
        sinks.open_sinks(TrackingConfig(wandb="mine"), tmp_path, "base", 0)


# ------------------------------------------------------------------------------------------------ in the loop


class FakeCheckpointer:
    """Stands for the checkpointer."""

    def __init__(self):
        self.saved = []

    def save(self, step, state, meta):
        self.saved.append(step)

    def wait(self):
        pass

    def due(self):
        return False


@pytest.mark.parametrize("stopping", [True, False])
def test_a_spike_stops_the_loop_with_a_checkpoint_where_that_is_wanted(tmp_path, log, stopping):
    import jax.numpy as jnp

    from nanochat_jax.errors import Interrupted
    from nanochat_jax.training import loop

    stop, checkpointer, curve = Stop(), FakeCheckpointer(), [*losses(40), *[9.0] * 10]
    tracker = Tracker(tmp_path, "base", 50, log, on_spike=stop.ask if stopping else None)

    def fit():
        loop.fit(
            loop.TrainState({}, (), jnp.int32(0)),
            step_fn=lambda state, batch: (state, {"loss": jnp.float32(curve[batch]), "grad_norm": jnp.float32(0)}),
            next_batch=lambda step, params: (step, {}),
            steps=50,
            save_every=1000,
            checkpointer=checkpointer,
            tracker=tracker,
            rates=lambda seconds: {},
            meta={},
            stop=stop,
        )

    if stopping:
        with pytest.raises(Interrupted, match="spike: 3 losses in a row above .*: stopped and saved at step 44 of 50"):
            fit()
    else:
        fit()
    tracker.close()
    assert checkpointer.saved == ([44] if stopping else [50])
    assert [r["step"] for r in rows(tmp_path) if "alarm" in r] == [43]


def test_a_loss_that_is_no_number_is_recorded(tmp_path, log):
    tracker = Tracker(tmp_path, "base", 9, log)
    tracker.record(1, loss=float("nan"))
    tracker.close()
    assert rows(tmp_path)[0]["loss"] is None and rows(tmp_path)[0]["alarm"] == "the loss is nan"
    assert "base 1/9  ALARM  the loss is nan" in log.path.read_text()


@pytest.mark.parametrize("steps", [6, 3])
def test_three_steps_are_traced_and_a_trace_ends_with_its_stage(tmp_path, steps):
    for stage in ("base", "sft"):  # a second one can only begin where the first has ended
        with traced(lambda n: jnp.arange(n).sum(), tmp_path / stage, start=0, first=2) as step:
            assert [int(step(n)) for n in range(steps)] == [sum(range(n)) for n in range(steps)]
        assert len(list((tmp_path / stage).rglob("*.trace.json.gz"))) == 1


def test_nothing_is_traced_where_nobody_asked(tmp_path):
    with traced(abs, tmp_path, start=0, first=None) as step:
        assert step is abs
