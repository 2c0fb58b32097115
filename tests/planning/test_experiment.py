"""Experiments: multipliers of runs from a known curve, the log of attempts, and an experiment that is killed."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest

from conftest import ROOT, kill_when
from nanochat_jax.config import ExperimentConfig, RunConfig
from nanochat_jax.errors import UserError
from nanochat_jax.planning import attempts, experiment, experiment_page, tree
from nanochat_jax.planning import multiplier as multiplier_file
from nanochat_jax.planning.multiplier import multipliers
from nanochat_jax.planning.runs import Run

SLOPE = 0.2  # bits per byte that a base gains with e times the tokens


def runs(tokens: float, gain: float, noise: float, seeds: int, rng, speed: float = 100.0) -> dict[int, Run]:
    """A model `gain` times as good by tokens as the base."""
    return {
        place: Run(round(tokens), tokens / speed, 2 - SLOPE * math.log(gain * tokens / 1e6) + noise * e, 1.0)
        for place, e in enumerate(rng.standard_normal(seeds))
    }


def test_a_gain_without_noise_is_exact():
    rng = np.random.default_rng(0)
    base = [runs(length * 1e6, 1.0, 0.0, 3, rng) for length in (1.4, 1.0)]
    found = multipliers(base, runs(1e6, 1.25, 0.0, 3, rng, speed=50.0))
    assert found.tokens.value == pytest.approx(1.25) and found.seconds.value == pytest.approx(0.625)
    assert found.tokens.low == pytest.approx(1.25) == found.tokens.high and not found.beyond
    # of fewer tokens it is as many times better, and a loss lies beyond the base's lengths
    assert multipliers(base, runs(5e5, 2.2, 0.0, 3, rng)).tokens.value == pytest.approx(2.2)
    lost = multipliers(base, runs(1e6, 0.5, 0.0, 3, rng))
    assert lost.tokens.value == pytest.approx(0.5) and lost.beyond


def test_intervals_hold_what_was_put_in(monkeypatch):
    """In nine of ten, whatever the number of seeds; those of a plain bootstrap over three would in six."""
    monkeypatch.setattr(multiplier_file, "DRAWS", 400)
    for seeds in (3, 5):
        rng, held = np.random.default_rng(seeds), 0
        for _ in range(100):
            base = [runs(length * 1e6, 1.0, 0.004, seeds, rng) for length in (1.0, 1.4)]
            found = multipliers(base, runs(1e6, 1.0, 0.004, seeds, rng)).tokens
            held += found.low <= 1 <= found.high
            assert found.high < 1.5
        assert 80 <= held <= 99, (seeds, held)


def test_a_base_that_does_not_improve_says_nothing():
    rng = np.random.default_rng(0)
    base = [runs(length * 1e6, 1 / length**2, 0.0, 3, rng) for length in (1.0, 1.4)]
    found = multipliers(base, runs(1e6, 1.2, 0.0, 3, rng)).tokens
    assert math.isnan(found.value) and (found.low, found.high) == (0.0, math.inf)


def test_the_page(tmp_path):
    rng = np.random.default_rng(1)
    found = {("base", length): runs(length * 1e6, 1.0, 0.003, 3, rng) for length in (1.0, 1.4)}
    found["better", 1] = runs(1e6, 1.2, 0.003, 3, rng)
    found["one_seed", 1] = runs(1e6, 1.2, 0.003, 1, rng)
    found["broken", 1] = {}
    settings = ExperimentConfig(variants={"better": ("base.optim.lr_scale=2",), "one_seed": (), "broken": ()})
    said = experiment_page.write(tmp_path, "base", settings, found, ["broken-0"])
    page, figures = (tmp_path / "experiment.md").read_text(), json.loads((tmp_path / "experiment.json").read_text())
    assert list(said["variants"]) == ["better"] and said["variants"]["better"]["tokens"]["low"] > 1
    assert [row["name"] for row in figures["rows"]] == ["base", "base", "better", "one_seed"]
    assert "better: `base.optim.lr_scale=2`" in page and "base, 1.4 times the budget" in page
    assert "Failed, and left out: broken-0" in page and "| one_seed | 1 |" in page
    assert (tmp_path / "experiment.png").stat().st_size > 20_000
    assert "same code" not in page

    found["better", 1][0] = dataclasses.replace(found["better", 1][0], code="0123")
    experiment_page.write(tmp_path, "base", settings, found, [])
    assert "not all runs are of the same code" in (tmp_path / "experiment.md").read_text().lower()

    for place, run in found["base", 1.4].items():  # a base that more training makes worse
        found["base", 1.4][place] = dataclasses.replace(run, bpb=3.0)
    said = experiment_page.write(tmp_path, "base", settings, found, [])
    assert said["variants"]["better"]["tokens"] == {"value": None, "low": 0.0, "high": None}
    json.loads((tmp_path / "experiment.json").read_text(), parse_constant=pytest.fail)
    assert "not known: more training does not help" in (tmp_path / "experiment.md").read_text()


def line(of: str, bpb: float) -> dict:
    return {**dict.fromkeys(attempts.FIELDS, ""), "tree": of, "val_bpb": str(bpb)}


def test_verdicts():
    first = [line("a", 2.0)]
    assert attempts.verdict(first[0], []) == "the first tree"
    assert attempts.verdict(line("a", 2.02), first) == "another seed of the first tree"
    assert "not known: repeat an attempt" in attempts.verdict(line("b", 1.9), first)
    known = [*first, line("a", 2.02), line("a", 1.98)]
    for bpb, said in ((1.9, "better: -0.1000"), (2.1, "worse: +0.1000"), (2.01, "within chance: +0.0100")):
        assert attempts.verdict(line("b", bpb), known).startswith(said)
    # the best is the tree whose mean is lowest, and another seed of it is held against the next best
    assert "+0.1000" in attempts.verdict(line("c", 2.0), [*known, line("b", 1.9)])
    assert "-0.1000" in attempts.verdict(line("b", 1.9), [*known, line("b", 1.9)])


def test_an_attempt_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    with pytest.raises(UserError, match="is not a checkout"):
        attempts.attempt(RunConfig(), tmp_path / "out", 1.0, "")
    assert not (tmp_path / "out").exists()


TINY = """
experiment:
  seeds: 2
  lengths: [1, 1.5]
  variants: {slow: [base.optim.lr_scale=0.2], itself: [seed=11]}
model: {depth: 1, width: 32, head_dim: 16, sequence_len: 64}
tokenizer: {vocab_size: 600, sample_chars: 200000}
data: {dir: %s, pack_buffer: 20}
base: {tokens: 40000, batch_tokens: 256, micro_batch: 4, eval_every: 0, eval_tokens: 1024, save_every: 40}
tracking: {samples: 0}
"""


@pytest.fixture
def tiny(own_sources):
    return own_sources(TINY)


@pytest.mark.slow
def test_a_killed_experiment_goes_on(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(tiny), "--out", str(out)]
    saved = out / "base-x1.5-0" / "base" / "checkpoints" / "40"
    kill_when(saved.is_dir, "-m", "nanochat_jax.planning.experiment", *command)
    assert (out / "base-0" / "base" / "done.json").is_file() and not (out / "base-1").exists()

    assert experiment.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == [] and said["variants"]["slow"]["tokens"]["high"] < 1
    own = said["variants"]["itself"]["tokens"]
    assert own["low"] < 1.2 and own["high"] > 0.8
    figures = json.loads((out / "experiment.json").read_text())
    assert [(r["name"], r["length"], r["seeds"]) for r in figures["rows"]] == [
        *(("base", length, 2) for length in (1.0, 1.5)),
        *((name, 1, 2) for name in ("slow", "itself")),
    ]
    assert len({(p / "tokenizer" / "tokenizer.model").read_bytes() for p in out.glob("*-[01]")}) == 1
    assert not list(out.glob("*/base/checkpoints"))
    assert "base: resumes from step " in (out / "base-x1.5-0" / "log.txt").read_text()
    began = time.monotonic()
    assert experiment.main(command) == 0 and time.monotonic() - began < 10  # nothing is trained again


@pytest.mark.slow
def test_attempts_are_logged(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    for number in range(2):
        assert experiment.main([str(tiny), "--out", str(out), "--minutes", "0.02", "--note", f"try {number}"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["seed"] == number and said["change"] == f"try {number}"
    rows = attempts.read(out / attempts.LOG)
    assert [row["verdict"] for row in rows] == ["the first tree", "another seed of the first tree"]
    assert rows[0]["tree"] == rows[1]["tree"] and float(rows[0]["val_bpb"]) != float(rows[1]["val_bpb"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("experiment*.yaml")), ids=lambda path: path.stem)
def test_experiments_of_the_documentation(path, tmp_path):
    found = experiment.read_experiment(str(path), None, [])
    wanted = experiment.points(found, tmp_path)
    assert {len(of) for of in wanted.values()} == {found.settings.seeds} and len(wanted) > 3
    assert len({one.config.seed for one in wanted["base", 1]}) == found.settings.seeds
    assert wanted["base", 1.4][0].config.base.tokens == pytest.approx(1.4 * wanted["base", 1][0].config.base.tokens)


def test_mistakes(tiny, capsys):
    for settings, said in (
        (["experiment.lengths=[1.4]"], "must be 1 and"),
        (["experiment.lengths=[1]"], "must be 1 and"),
        (["experiment.seeds=1"], "2 or more"),
        (["experiment.variants={base: [seed=1]}"], "cannot be a variant's name"),
        (["experiment.variants={a/b: [seed=1]}"], "cannot be a variant's name"),
        (["experiment.variants={a: [model.deepth=1]}"], "did you mean depth"),
        (["experiment.variants={a: [depth]}"], "key=value"),
        (["experiment.seed=3"], "did you mean seeds"),
    ):
        with pytest.raises(UserError, match=said):
            experiment.read_experiment(str(tiny), None, settings)
    for options, said in (
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--note", "wider"], "give --minutes as well"),
        (["--minutes", "1", "--jobs", "2"], "leave --jobs out"),
    ):
        assert experiment.main([str(tiny), *options]) == 2
        assert said in capsys.readouterr().err
