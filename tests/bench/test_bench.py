"""The benchmarks run, without what a bare GPU node lacks, and say what they measured."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from nanochat_jax.bench import curve, ops, parts, suite
from nanochat_jax.bench.__main__ import main, parse
from nanochat_jax.data.packed import write_packed

TINY = ["--depth=1", "--rows=2", "--seq=128", "--vocab=512"]


@pytest.fixture
def bench(tmp_path):
    """Runs a benchmark on a machine that lacks what a bare GPU node lacks; its last line."""
    (tmp_path / "bare").mkdir()
    lacks = ("pyarrow", "datasets", "fastapi", "pydantic", "matplotlib", "torch")
    blocked = f"import sys; sys.modules |= dict.fromkeys({lacks})"
    (tmp_path / "bare" / "sitecustomize.py").write_text(blocked)

    def run(*args: str) -> dict:
        command = [sys.executable, "-m", "nanochat_jax.bench", *args]
        env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'bare'}{os.pathsep}{ROOT}", "XLA_FLAGS": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def packed(folder, ids: int) -> str:
    rng = np.random.default_rng(0)
    write_packed(folder, ((rng.integers(0, ids, 129, np.uint16),) for _ in range(20)), 129, {})
    return f"--packed={folder}"


def test_train_says_how_fast_it_was_what_it_held_and_where_the_time_went(tmp_path, bench):
    more = ["--rounds=1", "--steps=2", "--accumulation=2", f"--profile={tmp_path / 'trace'}"]
    found = bench("train", *TINY, *more, packed(tmp_path / "rows", 512))
    ours = found["ours"]
    assert ours["low"] <= ours["tokens_per_second"] <= ours["high"] and ours["mfu"] is None
    assert 0 < found["about"]["planned_gb"] < ours["peak_memory_gb"]
    seconds = found["profile"]["parts"]
    assert {"attention", "products", "elementwise", "loss", "optimizer", "embedding"} <= set(seconds)
    assert seconds.get("other", 0) < 0.02 * sum(seconds.values())
    assert list(tmp_path.rglob("*.xplane.pb")) and list(tmp_path.rglob("*.trace.json.gz"))


@pytest.mark.slow
def test_curve_compares_precisions_on_the_same_tokens(tmp_path, bench):
    more = ["--steps=10", "--lr-scale=10", "--precision=float32,fp8", "--chance", f"--out={tmp_path / 'losses'}"]
    found = bench("curve", *TINY, *more, packed(tmp_path / "rows", 9))
    exact, rough, chance = (found["sides"][name] for name in ("float32", "fp8", "chance"))
    assert exact["largest_difference"] == 0 < rough["largest_difference"] < 0.02
    assert 0 < chance["largest_of_a_step"] < rough["largest_of_a_step"]
    assert exact["means"][-1] < exact["means"][0]
    losses = json.loads((tmp_path / "losses").read_text())["losses"]
    assert len(losses["float32"]) == 10 and losses["float32"][0] == pytest.approx(np.log(512), rel=0.01)


def test_differences_are_of_tenths_and_of_steps(capsys):
    found = curve.compare({"a": [2.0] * 20, "b": [2.0] * 19 + [2.2]})
    assert found["b"]["largest_of_a_step"] == pytest.approx(0.1)
    assert found["b"]["largest_difference"] == pytest.approx(0.05)


def test_ops_compares_every_part_with_its_roofline(capsys, monkeypatch):
    monkeypatch.setattr(ops, "SECONDS", 0.001)
    monkeypatch.setitem(ops.LARGE, "cpu", 256)
    assert main(["ops", *TINY]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    kinds = {name.split()[0] for name in found["parts"]}
    assert kinds == {"product", "attention", "elementwise", "loss", "embedding", "optimizer"}
    assert all(part["best"] > 0 and part["seconds"] > 0 for part in found["parts"].values())


def test_on_a_gpu_all_but_the_races_compile_beside_each_other():
    a, b, race = suite.Entry("a", "train", 1), suite.Entry("b", "train", 1), suite.Entry("race", "train", 1, True)
    assert suite.waves([a, race, b], gpu=True, reference=True) == [[a, b], [race]]
    assert suite.waves([a, race, b], gpu=True, reference=False) == [[a, race, b]]
    assert suite.waves([a, race, b], gpu=False, reference=False) == [[], [a], [race], [b]]


@pytest.mark.slow
def test_the_suite_goes_on_after_a_failure_and_leaves_out_what_would_not_end(tmp_path, monkeypatch, capsys):
    entries = (
        suite.Entry("bad", "train --depth many", 60),
        suite.Entry("slow", "train", 10_000),
        suite.Entry("good", f"ops {' '.join(TINY)} --only loss", 120),
        suite.Entry("flagged", "ops --help", 60, flags="--xla_no_such_flag=1"),
        suite.Entry("stuck", "decode --depth 1 --seq 64 --prompt 8 --new 8", 0.2),
    )
    monkeypatch.setattr(suite, "CPU", entries)
    monkeypatch.setattr(suite, "on_gpu", lambda: False)
    monkeypatch.delenv("XLA_FLAGS")
    with pytest.raises(SystemExit, match="1"):
        main(["suite", "--minutes=5", f"--out={tmp_path}"])
    records = {r["name"]: r for r in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert set(records) == {"bad", "good", "flagged", "stuck"} and "slow: left out" in capsys.readouterr().out
    assert records["bad"]["ended"] == "status 2" and records["bad"]["result"] is None
    assert records["good"]["result"]["parts"]["loss"]["seconds"] > 0
    assert records["flagged"]["flags"] and records["flagged"]["result"] is None  # XLA does not know it, and ends
    assert records["stuck"]["ended"] == "stopped after 0 s"


def test_every_entry_of_the_suite_is_a_command_that_is_understood():
    for entry in suite.GPU + suite.CPU:
        what, *args = entry.command.format(out="x").split()
        parse(what, args)
    assert sum(e.seconds for e in suite.GPU[:5]) < 12 * 60


def test_a_profile_is_told_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(
        parts,
        "events",
        lambda trace: [("fusion.1", "k", 2.0), ("while.3", "k", 9.0), ("", "cutlass_gemm", 1.0), ("", "what", 0.5)],
    )
    monkeypatch.setattr(parts, "parts_of_program", lambda text: {"fusion.1": "loss"})
    assert parts.by_part(tmp_path, "") == {"loss": 2.0, "products": 1.0, "other": 0.5}
