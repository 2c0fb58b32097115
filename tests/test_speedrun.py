"""The whole pipeline on a model of a few thousand parameters: what it leaves, how it stops, and how it goes on."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import run_speedrun
from conftest import speedrun_command as command
from conftest import speedrun_environment as environment
from nanochat_jax.config import differences, read_run_config
from nanochat_jax.errors import START_AGAIN, UserError

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("base", "mid", "sft", "rl")


def records(run_dir, stage):
    path = run_dir / stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break  # being written
    return out


def test_the_last_line_is_json_with_scores(whole):
    run_dir, done = whole
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["run_dir"] == str(run_dir)
    assert set(result["seconds"]) == {"tokenizer", *STAGES, "eval"} and min(result["seconds"].values()) > 0
    assert set(result["scores"]) == set(STAGES)
    assert {"bpb", "facts"} <= set(result["scores"]["base"])
    assert {"bpb", "facts", "spellingbee", "chatcore"} <= set(result["scores"]["rl"])


def test_everything_is_in_the_run_directory(whole):
    run_dir, done = whole
    for stage in STAGES:
        steps = [r["step"] for r in records(run_dir, stage) if "loss" in r]
        assert (
            steps == list(range(1, len(steps) + 1))
            and steps[-1] == json.loads((run_dir / stage / "done.json").read_text())["steps"]
        )
        assert (run_dir / "evals" / f"{stage}.json").is_file()
    losses = [r["loss"] for r in records(run_dir, "base") if "loss" in r]
    assert losses[-1] < losses[0] - 1
    assert {"reward", "completion_tokens", "truncated", "entropy"} <= set(records(run_dir, "rl")[-2])
    report = (run_dir / "report.md").read_text()
    assert (run_dir / "report" / "policy.png").is_file()
    for text in ("BASE", "SFT", "bits per byte", "SpellingBee", "$0.0", "git commit", "Who are you?"):
        assert text in report
    assert re.search(r"\| training in \| (bfloat16|float32) \|", report)  # as the cores are
    assert (run_dir / "report" / "loss.png").stat().st_size > 5000
    log = (run_dir / "log.txt").read_text()
    assert "base 120/120  loss" in log and "MFU n/a" in log and "left: " in log
    assert "base 120/120" in done.stderr and "\x1b[" not in done.stderr  # plain lines without a terminal


def test_stages_that_are_done_are_skipped(whole, place, capsys):
    run_dir, _ = whole
    before = {s: (run_dir / s / "done.json").stat().st_mtime_ns for s in STAGES}
    began = time.perf_counter()
    assert run_speedrun.main(command(place, run_dir)[2:] + ["price_per_hour=3"]) == 0
    assert time.perf_counter() - began < 60
    assert before == {s: (run_dir / s / "done.json").stat().st_mtime_ns for s in STAGES}
    assert json.loads(capsys.readouterr().out)["scores"]["base"]["bpb"] > 0


def kill_at(place, run_dir, stage, step, number):
    """Runs the command until `stage` has recorded `step`, sends the signal, and returns the exit status."""
    process = subprocess.Popen(
        command(place, run_dir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    give_up = time.monotonic() + 300
    while len(records(run_dir, stage)) < step and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.mark.slow
def test_kill_9_in_every_stage_and_the_same_losses_bit_for_bit(whole, place):
    reference, _ = whole
    run_dir, rng = place / "killed", random.Random(time.time_ns())
    for stage in STAGES:
        steps = len(records(reference, stage))
        at = rng.randrange(1, steps - 2)
        assert kill_at(place, run_dir, stage, at, signal.SIGKILL) == -signal.SIGKILL, f"{stage} ended before step {at}"
        assert not (run_dir / stage / "done.json").is_file(), f"{stage} killed at {at} of {steps}: too late"
    done = subprocess.run(
        command(place, run_dir, "--stages", "rl"), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    timing = ("time", "tokens_per_second", "mfu", "memory_gb")
    for stage in STAGES:
        got, want = (
            [{k: v for k, v in r.items() if k not in timing} for r in records(d, stage)] for d in (run_dir, reference)
        )
        assert got == want, stage


@pytest.mark.slow
def test_sigterm_saves_first(whole, place):
    run_dir = place / "stopped"
    assert kill_at(place, run_dir, "base", 31, signal.SIGTERM) == START_AGAIN
    steps = max(r["step"] for r in records(run_dir, "base"))
    saved = sorted(int(p.name) for p in (run_dir / "base" / "checkpoints").iterdir() if p.name.isdecimal())
    assert 31 <= saved[-1] == steps < 120


def fails(capsys, *argv) -> str:
    """The one line that a mistake is worth, after what the run has said of its stages."""
    assert run_speedrun.main(list(argv)) == 2
    out, err = capsys.readouterr()
    *_, line = err.splitlines()
    assert out == "" and line.startswith("error: ") and "Traceback" not in err
    return line


def test_mistakes_are_one_line(whole, place, tmp_path, capsys):
    run_dir, _ = whole
    config = ["--config", str(place / "tiny.yaml")]
    assert "did you mean depth" in fails(capsys, *config, "--run-dir", str(tmp_path / "a"), "model.dept=3")
    assert "was made with other settings (model.depth: 2, now 3)" in fails(
        capsys, *config, "--run-dir", str(run_dir), "model.depth=3"
    )
    assert "unknown stage bass" in fails(capsys, *config, "--stages", "bass")
    assert "no configuration file" in fails(capsys, "--config", "nosuch.yaml")
    assert "needs tokenizer" in fails(capsys, *config, "--run-dir", str(tmp_path / "b"), "--stages", "base")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    assert "not a run directory" in fails(capsys, *config, "--run-dir", str(tmp_path / "c"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "files of documents" in fails(capsys, *config, "--run-dir", str(tmp_path / "d"), f"data.dir={empty}")
    assert "rl.task=facts is categorical" in fails(
        capsys, *config, "--run-dir", str(tmp_path / "e"), "--stages", "tokenizer,base,rl", "rl.task=facts", *SHORT
    )


SHORT = ("base.tokens=4096", "base.batch_tokens=4096", "base.micro_batch=4", "base.eval_every=0", "mesh.data=8")


@pytest.mark.slow
def test_eight_devices_train_as_one_does(whole, place, tmp_path):
    """The same seed and settings on a mesh of eight simulated devices, as this process has them."""
    settings = ["--stages", "tokenizer,base", "base.batch_tokens=1024", "base.tokens=8192", "base.micro_batch=1"]
    one = tmp_path / "one"
    subprocess.run(command(place, one, *settings), cwd=ROOT, env=environment(), check=True, capture_output=True)
    eight = tmp_path / "eight"
    assert run_speedrun.main(command(place, eight, *settings, "mesh.fsdp=2")[2:]) == 0
    got, want = ([r["loss"] for r in records(d, "base") if "loss" in r] for d in (eight, one))
    assert len(got) == 8 and got == pytest.approx(want, rel=1e-5)


def test_a_stage_whose_settings_changed_is_made_anew_with_all_later_ones(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    config = read_run_config(run)
    changed = replace(config, sft=replace(config.sft, epochs=2.0))
    with pytest.raises(UserError, match=r"sft.epochs: 1.0, now 2.0\); .* or name sft in --stages"):
        run_speedrun.clear_changed(run, changed, [], True)
    with pytest.raises(UserError, match="sft and rl would be made anew and their checkpoints lost: --yes does that"):
        run_speedrun.clear_changed(run, changed, ["sft"], False)
    assert all((run / stage / "done.json").is_file() for stage in ("base", "mid", "sft", "rl", "eval"))
    assert run_speedrun.clear_changed(run, changed, ["sft"], True).endswith("sft and rl removed, to be made anew")
    assert [s for s in run_speedrun.STAGES[:6] if (run / s).exists()] == ["tokenizer", "base", "mid"]
    assert {p.name.split(".")[0] for p in (run / "evals").iterdir()} <= {"base", "mid"}


def test_what_no_result_depends_on_may_change(whole):
    config = read_run_config(whole[0])
    other = replace(config, sft=replace(config.sft, save_every=7), data=replace(config.data, pack_workers=1))
    assert run_speedrun.clear_changed(whole[0], other, [], False) == ""


def test_the_settings_of_a_stage_that_has_not_run_may_change(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("rl"))
    config = read_run_config(run)
    assert run_speedrun.clear_changed(run, replace(config, rl=replace(config.rl, steps=9)), [], False) == ""
    assert (
        run_speedrun.clear_changed(run, replace(config, evals=replace(config.evals, samples=2)), ["eval"], False) == ""
    )
    assert (run / "sft").exists() and not (run / "eval").exists()  # evaluated anew, with the new settings


def test_differences_name_what_differs():
    old = {"a": {"b": 1, "c": 2}, "evals": {"x": 1}}
    assert differences(old, {"a": {"b": 1, "c": 3}, "evals": {"x": 2}}) == ["a.c: 2, now 3"]


def test_unknown_device_memory_takes_a_small_config(monkeypatch):
    class Device:
        def __init__(self, size):
            self.size = size

        def memory_stats(self):
            return {"bytes_limit": self.size}

    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for size, want in ((79e9, "d24"), (47e9, "d20"), (23e9, "d12"), (7e9, "demo")):
        monkeypatch.setattr(jax, "devices", lambda size=size: [Device(size)])
        assert run_speedrun.fitting_config().stem == want
