"""The dashboard: what it shows of runs that train, stand still, are over or broken; and that it writes nothing."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conftest import ROOT
from nanochat_jax import watch
from nanochat_jax.watch import StageView, duration, frame, read_stage, sparkline

START = 1_700_000_000.0


def record(step: int, of=100, pace=2.0, **values) -> dict:
    return {"stage": "base", "step": step, "of": of, "time": START + pace * step, **values}


def write(run_dir: Path, stage: str, records: list[dict], done: dict | None = None) -> None:
    (run_dir / stage).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in records)
    (run_dir / stage / "metrics.jsonl").write_text(text)
    if done:
        (run_dir / stage / "done.json").write_text(json.dumps(done))


@pytest.fixture
def run_dir(tmp_path):
    """base at step 40 of 100, 2 s a step, with an alarm and a sample; the last line is being written."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "log.txt").write_text("2026-01-01 10:00:00  — base\n2026-01-01 10:00:09  base 40/100  loss 3.0000\n")
    steps = [record(i, loss=5 - i / 20, tokens_per_second=6900.0, mfu=0.5, memory_gb=1.25) for i in range(1, 41)]
    steps[30]["alarm"] = "spike: [3] losses"
    steps.insert(20, record(20, val_bpb=2.5, sample="The capital of [France] is x\nThe sky is y"))
    write(tmp_path, "base", steps)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "done.json").write_text('{"seconds": 75}')
    with open(tmp_path / "base" / "metrics.jsonl", "a") as f:
        f.write('{"stage": "base", "st')
    return tmp_path


def picture(run_dir: Path, now: float, width=80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame(run_dir, now))
    return console.export_text()


def test_a_stage_that_trains(run_dir):
    text = picture(run_dir, START + 81)
    row = next(line for line in text.splitlines() if line.startswith("base"))
    assert "40/100" in row and "2.5000" in row and "6.9k" in row and "50.0%" in row and "1.25" in row
    assert "2:00 left" in row and row.rstrip().endswith("▁") and "█" in row
    assert "done 1:15" in text and "base step 31: spike: [3] losses" in text
    assert "samples (base, step 20)" in text and "The capital of [France] is x" in text
    assert "10:00:09  base 40/100  loss 3.0000" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_stage_that_is_silent_or_over(run_dir):
    assert "silent for 10:00" in picture(run_dir, START + 80 + 600)
    write(run_dir, "base", [record(i, loss=2.0) for i in range(1, 101)], {"seconds": 3723, "steps": 100})
    write(run_dir, "rl", [record(i, of=9, loss=0.0, reward=i / 9) for i in range(1, 10)], {"seconds": 9, "steps": 9})
    text = picture(run_dir, START + 1e6)
    assert "done 1:02:03" in text and "silent for" not in text
    row = next(line for line in text.splitlines() if line.startswith("rl"))
    assert "r 0.556" in row and "▁▂" in row


def test_samples_of_the_evaluation_come_first(run_dir):
    (run_dir / "evals").mkdir()
    samples = [{"prompt": "Who are you?", "completion": "I am\n\nsmall."}]
    (run_dir / "evals" / "sft.json").write_text(json.dumps({"samples": samples}))
    text = picture(run_dir, START)
    assert "samples (sft, evaluated)" in text and "Who are you? → I am small." in text


def test_time_left_does_not_count_a_pause():
    records = [record(i, loss=1.0) for i in range(1, 21)]
    records += [{**record(i, loss=1.0), "time": START + 90_000 + 2 * i} for i in range(21, 41)]
    assert StageView("base", records, None).pace == pytest.approx((38 * 2 + 60) / 39)
    assert StageView("base", records[:1], None).pace is None


def test_old_records_have_no_number_of_steps(run_dir):
    old = [{"step": i, "time": START + i, "loss": 1.0} for i in range(1, 9)]
    write(run_dir, "base", old)
    assert " 8 " in picture(run_dir, START + 9) and "running" in picture(run_dir, START + 9)
    write(run_dir, "base", old, {"seconds": 8, "steps": 8})
    assert "done 8 s" in picture(run_dir, START + 9)


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "base" in picture(tmp_path, START)


def test_records_are_read_again_when_they_change(run_dir):
    first = read_stage(run_dir, "base").records
    assert read_stage(run_dir, "base").records is first
    with open(run_dir / "base" / "metrics.jsonl", "w") as f:
        f.write(json.dumps(record(1, loss=1.0)) + "\n")
    assert len(read_stage(run_dir, "base").records) == 1


def test_parts():
    assert sparkline([]) == "" and sparkline([1]) == "▁" and sparkline([1, 1]) == "▁▁"
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█" and len(sparkline(range(1000), 10)) == 10
    assert [duration(s) for s in (3.4, 65, 3723, 90_000)] == ["3 s", "1:05", "1:02:03", "1 day, 1:00:00"]


def test_the_command_shows_a_frame_writes_nothing_and_needs_no_jax(run_dir):
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in run_dir.rglob("*")}
    code = (
        "import sys; from nanochat_jax import watch; s = watch.main(sys.argv[1:]); sys.exit(s or 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(run_dir), "--once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "40/100" in done.stdout, done.stderr
    assert before == {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in run_dir.rglob("*")}


def test_live_frames_until_ctrl_c(run_dir, monkeypatch, capsys):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert watch.main([str(run_dir), "--every", "7"]) == 0 and naps == [7.0] * 3
    assert "40/100" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert watch.main([str(tmp_path / "nosuch"), "--once"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert watch.main([str(tmp_path), "--once"]) == 2
