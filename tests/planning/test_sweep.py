"""Sweeps: the fits on points from a known law, what is said where there is none, and a sweep that is killed."""

import json
import time

import numpy as np
import pytest

from conftest import ROOT, kill_when
from nanochat_jax.config import SweepConfig
from nanochat_jax.errors import UserError
from nanochat_jax.model import scaling
from nanochat_jax.planning import fit, sweep, sweep_page
from nanochat_jax.planning.fit import Cost, Law, NoFit, fit_law, fit_parabolas
from nanochat_jax.planning.sweep_page import Result

LAW = Law(E=1.7, A=400.0, alpha=0.34, B=410.0, beta=0.28)
COST = Cost(k=9.0, b=0.97)
SIZES, BUDGETS = (9e4, 1.8e5, 3.3e5, 5.5e5, 8.6e5), (4e11, 1.2e12, 3.6e12)


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(fit, "DRAWS", 60)


def points(noise: float, sizes=SIZES, budgets=BUDGETS, seed: int = 0):
    """(parameters, tokens, losses, FLOPs) of LAW with so much noise."""
    n, c = (a.ravel() for a in np.meshgrid(sizes, budgets))
    d = COST.tokens(c, n)
    return n, d, LAW.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n))), c


def test_the_law_is_recovered():
    n, d, losses, _ = points(0.0)
    exact = fit_law(n, d, losses, COST, BUDGETS)
    assert [exact.constants[name].value for name in ("alpha", "beta", "E")] == pytest.approx(
        [0.34, 0.28, 1.7], rel=1e-3
    )
    best = exact.optima[-1]
    grid = np.geomspace(1e4, 1e7, 20001)  # what the formula for the best size is held against
    lowest = grid[np.argmin(LAW.loss(grid, COST.tokens(3.6e12, grid)))]
    assert best.params.value == pytest.approx(lowest, rel=1e-2) and best.inside
    assert best.ratio.value == pytest.approx(COST.tokens(3.6e12, lowest) / lowest, rel=2e-2)


@pytest.mark.slow
def test_intervals_hold_what_was_put_in():
    """Mostly: 90 % of them should, and of alpha's three in four do."""
    ratio = COST.tokens(BUDGETS[-1], best := LAW.best_params(BUDGETS[-1], COST)) / best
    held = {"alpha": 0, "beta": 0, "exponent": 0, "ratio": 0}
    for seed in range(6):
        n, d, losses, _ = points(0.002, seed=seed)
        fit = fit_law(n, d, losses, COST, BUDGETS)
        assert 0.0007 < fit.residual < 0.004
        found = {**fit.constants, "ratio": fit.optima[-1].ratio}
        for name, value in {"alpha": 0.34, "beta": 0.28, "exponent": LAW.exponent(COST), "ratio": ratio}.items():
            held[name] += found[name].low <= value <= found[name].high
            assert found[name].low < found[name].value < found[name].high
        assert found["ratio"].high < 2 * found["ratio"].low
    assert sum(held.values()) >= 14 and min(held.values()) >= 2, held


def test_parabolas_find_the_minimum():
    n, _, losses, c = points(0.0005, sizes=np.geomspace(1e5, 1e6, 6))
    found = fit_parabolas(n, losses, c, COST)
    for parabola in found.each:
        want = LAW.best_params(parabola.flops, COST)
        assert parabola.optimum.params.value == pytest.approx(want, rel=0.15)
        assert parabola.optimum.ratio.low < parabola.optimum.ratio.value < parabola.optimum.ratio.high
    assert found.exponent.value == pytest.approx(LAW.exponent(COST), abs=0.05)


def test_what_cannot_be_fitted_is_said():
    n, d, losses, c = points(0.0)
    with pytest.raises(NoFit, match="needs 8 models, here are 7"):
        fit_law(n[:7], d[:7], losses[:7], COST, BUDGETS)
    with pytest.raises(NoFit, match="3 different numbers of tokens, here are 1"):
        fit_law(n, np.full_like(d, 1e6), losses, COST, BUDGETS)
    with pytest.raises(NoFit):
        fit_law(n, d, LAW.loss(n, d) * np.exp(0.2 * np.random.default_rng(1).standard_normal(len(n))), COST, BUDGETS)
    with pytest.raises(NoFit, match="as the law wants"):
        fit_law(n, d, LAW.E + 1e-6 * n**0.3, COST, BUDGETS)  # larger models are worse
    with pytest.raises(NoFit, match="3 sizes"):
        fit_parabolas(n[:2], losses[:2], c[:2], COST)
    with pytest.raises(NoFit, match="take a fourth"):
        fit_parabolas(n[:3], losses[:3], c[:3], COST)


def test_a_minimum_beyond_the_sizes_is_none():
    n, _, losses, c = points(0.0, sizes=np.geomspace(1e4, 4e4, 5))  # the best are larger
    found = fit_parabolas(n, losses, c, COST)
    assert [(p.optimum, p.why_not) for p in found.each] == [(None, "no minimum between the sizes tried")] * 3
    assert found.exponent is None


def models(noise: float, **which) -> list[Result]:
    rows = zip(*points(noise, **which))
    return [
        Result(f"d{k}", c, k, 16 * k, int(n), int(2 * n), int(d), 0.5 + d / 2e6, int(c / d), loss / 3, loss, 10.0)
        for k, (n, d, loss, c) in enumerate(rows, 2)
    ]


def test_the_page(tmp_path):
    found = models(0.002)
    said = sweep_page.write(tmp_path, SweepConfig(flops=BUDGETS), found, ["d9-3.6e12"])
    page, figures = (tmp_path / "sweep.md").read_text(), json.loads((tmp_path / "sweep.json").read_text())
    assert said["models"] == len(figures["models"]) == 15
    law, ratio = figures["law"]["constants"], said["tokens_per_parameter"]
    assert law["beta"]["low"] <= LAW.beta <= law["beta"]["high"]
    assert figures["best"]["by"] == "the law" and figures["best"]["ratio"] == ratio and ratio["low"] < ratio["high"]
    assert f"**{ratio['value']:.3g} tokens per parameter** (90% interval" in page
    assert "d9-3.6e12" in page and "saw text more than once" in page and "(isoflop.png)" in page
    assert (tmp_path / "isoflop.png").stat().st_size > 20_000


def test_too_few_models_are_said_plainly(tmp_path):
    said = sweep_page.write(tmp_path, SweepConfig(flops=BUDGETS), models(0.0)[:2], [])
    page, figures = (tmp_path / "sweep.md").read_text(), json.loads((tmp_path / "sweep.json").read_text())
    assert said["tokens_per_parameter"] is None and figures["best"] is None
    assert page.count("None: a fit needs 3 sizes of model, here are 2.") == 2 and "They do not tell" in page
    assert figures["law"] == {"why_not": "a fit needs 3 sizes of model, here are 2"}


TINY = """
sweep: {depths: [2, 1], ratios: [0.5, 1], aspect_ratio: 32}
model: {head_dim: 16, sequence_len: 64}
tokenizer: {vocab_size: 600, sample_chars: 200000}
data: {dir: %s, pack_buffer: 20}
base: {batch_tokens: 128, micro_batch: 2, eval_every: 0, eval_tokens: 1024, save_every: 200}
mid: {mixture: {facts: -50}}
"""


@pytest.fixture
def tiny(own_sources):
    """A sweep of two depths on this project's own sources."""
    return own_sources(TINY)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sweep", str(tiny), "--out", str(out), "sweep.ratios=[1]"]
    saved = out / "d2-ratio1" / "base" / "checkpoints" / "200"
    kill_when(saved.is_dir, "-m", "nanochat_jax.scaling", *command)
    assert not (out / "d2-ratio1" / "base" / "done.json").is_file() and not (out / "d1-ratio1").exists()

    assert sweep.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "models": 2, "failed": [], "tokens_per_parameter": None}
    assert "base: resumes from step " in (out / "d2-ratio1" / "log.txt").read_text()
    assert (
        len({(out / name / "tokenizer" / "tokenizer.model").read_bytes() for name in ("d1-ratio1", "d2-ratio1")}) == 1
    )
    assert "— tokenizer" not in (out / "d1-ratio1" / "log.txt").read_text()
    figures = json.loads((out / "sweep.json").read_text())["models"]
    assert [(m["depth"], m["width"]) for m in figures] == [(2, 64), (1, 32)]
    for m in figures:
        done = json.loads((out / m["name"] / "base" / "done.json").read_text())
        assert m["val_loss"] == done["metrics"]["val_loss"] < np.log(600)
        assert m["tokens"] == done["tokens"] == pytest.approx(m["params"], rel=0.02)
        assert m["flops"] == m["tokens"] * m["flops_per_token"]

    began = time.monotonic()
    assert sweep.main(command) == 0 and time.monotonic() - began < 5  # nothing is trained again
    assert sweep.main([*command, "base.batch_tokens=256"]) == 2
    assert "was made with other settings (base.batch_tokens: 128, now 256)" in capsys.readouterr().err


def test_points_and_mistakes(tiny):
    _, found = sweep.read_sweep(str(tiny), None, ["sweep.flops=[1e9,2.5e8]", "sweep.ratios=[]"])
    assert [p.name for p in found] == ["d2-2.5e08", "d1-2.5e08", "d2-1e09", "d1-1e09"]
    for p in found:
        cfg = scaling.gpt_config(p.config.model, p.config.tokenizer.vocab_size)
        assert p.config.base.tokens * scaling.flops_per_token(cfg) == pytest.approx(p.budget, rel=3e-3)
    for settings, said in (
        (["sweep.ratios=[]"], "either sweep.flops or sweep.ratios"),
        (["sweep.flops=[1e9]"], "either sweep.flops or sweep.ratios"),
        (["sweep.depths=[2,1,2]"], "stands twice"),
        (["sweep.depths=[0]"], "must be more than 0"),
        (["sweep.depth=[1]"], "did you mean depths"),
    ):
        with pytest.raises(UserError, match=said):
            sweep.read_sweep(str(tiny), None, settings)


@pytest.mark.parametrize("name", ["miniseries", "miniseries_cpu"])
def test_shipped_sweeps_are_read(name):
    found, points = sweep.read_sweep(str(ROOT / "configs" / f"{name}.yaml"), None, [])
    assert len(points) == len(found.depths) * len(found.flops) >= fit.POINTS
    assert len({p.name for p in points}) == len(points)


def test_the_plan(capsys):
    assert sweep.main(["sweep", str(ROOT / "configs/miniseries.yaml"), "--plan", "--gpu", "h100", "--count", "8"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == 25 and rows[1].startswith("d10-1e18") and "24 models, 1.0" in last
