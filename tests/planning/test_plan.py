"""The plan: against the published runs, against the compiled step and a run here, and what it says of mistakes."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

import run_speedrun
from conftest import ROOT
from nanochat_jax.config import load_config
from nanochat_jax.errors import UserError
from nanochat_jax.model import scaling
from nanochat_jax.planning import footprint, plan, published, targets
from nanochat_jax.planning.plan import Machine, Speed
from nanochat_jax.training import memory

NODE = Machine("h100", 8, 24.0)
TINY = ["model.depth=2", "model.width=32", "model.head_dim=16", "model.sequence_len=64", "tokenizer.vocab_size=512"]
TINY += ["base.tokens=4096", "base.batch_tokens=1024", "base.micro_batch=2", "base.eval_tokens=1024"]


def planned(name: str, *settings: str, on=NODE) -> plan.Plan:
    return plan.make(load_config(ROOT / "configs" / f"{name}.yaml", None, settings), on, exact=False)[0]


def test_the_hundred_dollar_run():
    """Published: 3 h 51 min on 8 H100s at $24 an hour, of which base 172 min of steps; no RL."""
    stages = {s.name: s for s in planned("classic_d20", "evals.stages=base,mid,sft").stages()}
    assert stages["base"].steps == 21_400 and stages["base"].flops == pytest.approx(3.92e19, rel=0.01)
    assert stages["mid"].steps == pytest.approx(765, rel=0.15)
    whole = plan.summed([s for name, s in stages.items() if name != "rl"])
    assert whole.seconds == pytest.approx(3600 * 3.85, rel=0.15)
    assert plan.dollars(whole, NODE) == pytest.approx(3.85 * 24, rel=0.15)


def test_the_record_run():
    """Published: d24, fp8, 5568 steps of 2^20 tokens in 1.65 h at 983k tokens/s."""
    made = planned("d24", "base.fp8=true")
    base = made.stages()[1]
    assert (base.steps, base.batch_tokens) == (5568, 2**20)
    assert made.speed("base").flops * 8 / made.each == pytest.approx(983_000, rel=0.05)
    assert base.seconds == pytest.approx(3600 * 1.65, rel=0.15)
    assert plan.dollars(base, NODE) == pytest.approx(1.65 * 24, rel=0.15)


def test_published_rates_between_depths_and_elsewhere():
    assert published.tabled_mfu("h100", "modern", False, 15)[0] == pytest.approx(0.435)
    assert published.tabled_mfu("h100", "modern", False, 6)[0] == 0.41
    assert published.tabled_mfu("h200", "modern", True, 40)[0] == 0.57
    assert published.tabled_mfu("a100", "modern", True, 12)[0] == 0.65  # no fp8 there
    assert "nothing is published" in published.tabled_mfu("", "modern", False, 12)[2]


def test_eight_that_were_measured_as_one_wait_for_links():
    """Without a compiled step nothing hides them: 4 bytes of gradient and 2 of parameter, but a device's own eighth."""
    one, eight = (planned("d12", on=Machine("rtx4090", n)) for n in (1, 8))
    params = 4 * 7 / 8 + 2 * 7 / 8
    waits = 2 * 10e-6 + params * scaling.param_counts(eight.cfg)["total"] / (0.8 * 32e9)
    alone = eight.base.batch_tokens * eight.each / (8 * one.speed("base").flops)
    assert eight.speed("base").flops == pytest.approx(one.speed("base").flops * alone / (alone + waits))
    assert "8 of them wait" in eight.speed("base").source and "wait" not in one.speed("base").source
    assert "wait" not in planned("d24").speed("base").source  # published of eight


# GB that the compiled step needs on one H100, by targets.py: (arch, depth, vocabulary, rows) -> GB
COMPILED = {
    ("modern", 12, 32768, 1): 6.0,
    ("modern", 12, 32768, 4): 8.8,
    ("modern", 12, 32768, 8): 11.9,
    ("modern", 12, 32768, 16): 17.4,
    ("modern", 20, 32768, 1): 18.1,
    ("modern", 20, 32768, 8): 31.7,
    ("modern", 20, 32768, 16): 47.8,
    ("modern", 24, 32768, 1): 27.0,
    ("modern", 24, 32768, 4): 35.5,
    ("modern", 24, 32768, 8): 46.5,
    ("modern", 24, 32768, 16): 65.5,
    ("modern", 26, 32768, 8): 55.1,
    ("modern", 26, 32768, 16): 76.3,
    ("classic", 20, 65536, 1): 11.4,
    ("classic", 20, 65536, 8): 25.8,
    ("classic", 20, 65536, 32): 67.0,
}


@pytest.mark.parametrize(("arch", "depth", "vocab", "rows"), COMPILED)
def test_the_formula_is_near_the_compiled_step(arch, depth, vocab, rows):
    settings = [f"model.arch={arch}", f"model.depth={depth}", f"tokenizer.vocab_size={vocab}"]
    made = plan.Plan(load_config(None, None, settings), Machine("h100", 1))
    want = COMPILED[arch, depth, vocab, rows]
    assert footprint.estimate(made, rows).total / 1e9 == pytest.approx(want, rel=0.1 if rows > 1 else 0.13)


# GB of the same with less kept, compiled for an rtx4090 and an a100
KEPT = {
    (20, 8, "full", "float32"): 17.33,
    (20, 8, "block", "float32"): 21.49,
    (20, 8, "block", "light"): 17.73,
    (24, 2, "full", "light"): 18.07,
    (24, 8, "full", "light"): 20.17,
    (24, 8, "full", "float32"): 25.82,
    (24, 8, "block", "float32"): 31.88,
    (26, 4, "full", "float32"): 29.29,
    (26, 8, "full", "float32"): 30.92,
}


@pytest.mark.parametrize(("depth", "rows", "level", "state"), KEPT)
def test_the_formula_is_near_the_compiled_step_that_keeps_less(depth, rows, level, state):
    config = load_config(None, None, [f"model.depth={depth}", f"optimizer_state={state}"])
    made = plan.Plan(config, Machine("a100", 1))
    assert footprint.estimate(made, rows, level).total / 1e9 == pytest.approx(KEPT[depth, rows, level, state], rel=0.03)


def test_a_small_card_takes_what_fits_it():
    """d24 on 24 GB: only with the lightest of both; 40 GB keep more of d20 than 24."""
    d24 = load_config(None, None, ["model.depth=24"])
    assert footprint.estimated(plan.Plan(d24, Machine("rtx4090", 1))).rows == 0
    light = footprint.estimated(plan.Plan(dataclasses.replace(d24, optimizer_state="light"), Machine("rtx4090", 1)))
    assert (light.rows, light.remat) == (8, "full")
    d20 = load_config(None, None, ["model.depth=20"])
    levels = [footprint.estimated(plan.Plan(d20, Machine(gpu, 1))).remat for gpu in ("rtx4090", "a100", "h100")]
    assert levels == ["block", "none", "none"]
    forced = dataclasses.replace(d20, remat="full")
    assert footprint.estimated(plan.Plan(forced, Machine("h100", 1))).remat == "full"


def test_state_is_what_the_optimizer_holds():
    for arch, kept in (("modern", "float32"), ("classic", "float32"), ("modern", "light")):
        config = load_config(None, None, [*TINY, f"model.arch={arch}", f"optimizer_state={kept}"])
        made = plan.Plan(config, Machine(None, jax.device_count()))
        state = footprint.Compiled(made).state
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))
        # beside it is what is kept by row
        assert footprint.state_bytes(made.cfg, made.light) == pytest.approx(held, rel=0.04)


class Recorded(footprint.Compiled):
    """The step that a plan compiled."""

    made: list = []

    def __init__(self, job):
        super().__init__(job)
        self.made.append(self)

    def seconds(self, rows, level):
        return super().seconds(rows, level, least=0.1)


def test_a_step_that_is_compiled_here_and_timed(monkeypatch):
    monkeypatch.setattr(footprint, "Compiled", Recorded)
    one = jax.devices()[:1]  # of the eight simulated ones, whose collectives take long to compile
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = load_config(None, None, TINY)
    made, found = plan.make(config, plan.machine(None, None, None, config), "")
    (compiled,) = Recorded.made
    assert found.total == memory.needed_bytes(compiled.program(found.rows, found.remat)) and found.rows == 2
    assert min(found.parameters, found.optimizer, found.gradients, found.activations) > 0
    assert "timed now" in made.speed("base").source and made.stages()[1].seconds > 0


def test_steps_of_rl_are_an_epoch_over_its_questions():
    assert planned("d24").stages()[4].steps == 7473 // 16
    config = load_config(None, None, ["rl.task={arithmetic: 3, spellingbee: 1}", "rl.questions=16"])
    mixed = plan.Plan(config, Machine("h100", 1))  # 100,000 questions of each
    assert mixed.stages()[4].steps == 100_000 * 4 // 3 // 16


def test_memory_is_split_as_the_mesh_says():
    """d12 with 32 rows at a time, beside what targets.py compiles."""
    config = load_config(ROOT / "configs" / "d12.yaml")
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=8))
    found = [
        footprint.estimate(plan.Plan(c, on), 32)
        for c, on in ((config, Machine("h100", 1)), (config, NODE), (split, NODE))
    ]
    alone, copied, shared = found
    assert alone.total / 1e9 == pytest.approx(29.02, rel=0.03)
    assert copied.optimizer == shared.optimizer == pytest.approx(alone.optimizer / 8)
    assert shared.parameters == copied.parameters < alone.parameters  # what training holds is split either way
    assert all(20.37 <= m.total / 1e9 < 1.3 * 20.37 for m in (copied, shared))  # one micro-batch needs less


def test_what_does_not_fit_is_said(capsys):
    assert run_speedrun.main(["--plan", "--gpu", "rtx4090", "--config", str(ROOT / "configs" / "d32.yaml")]) == 0
    out = capsys.readouterr().out
    assert "not even one row fits" in out and json.loads(out.splitlines()[-1])["memory"]["rows"] == 0


def test_a_plan_runs_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "devices", lambda *a: (_ for _ in ()).throw(UserError("no libraries")))
    assert run_speedrun.main(["--plan", "--gpu", "h100", "--count", "8", "--price", "3", "--run-dir", "x"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("modern d24, 1.38 G parameters, on 8 x NVIDIA H100 80GB HBM3 at $24.00 an hour")
    assert any("by formula" in line for line in lines) and max(map(len, lines[1:9])) <= 80
    stages = json.loads(last)["stages"]
    assert set(stages) == {*plan.STAGES, "all"} and stages["all"]["dollars"] > stages["base"]["dollars"] > 20
    assert list(tmp_path.iterdir()) == []


def test_a_budget_names_the_deepest_that_it_pays_for(capsys):
    argv = ["--gpu", "h100", "--count", "8", "--price", "3", "--config", str(ROOT / "configs" / "d24.yaml")]
    assert run_speedrun.main(["--budget", "100", *argv]) == 0
    out = capsys.readouterr().out
    best = json.loads(out.splitlines()[-1])["depth"]
    costs = {int(w[0][1:]): float(w[-1].strip("$").replace(",", ""))
             for line in out.splitlines() if (w := line.split()) and w[-1].startswith("$")}  # fmt: skip
    assert costs[best] <= 100 < costs[best + 2] and list(costs.values()) == sorted(costs.values())
    assert run_speedrun.main(["--budget", "1", *argv]) == 0
    assert "no depth of the series is within $1.00" in capsys.readouterr().out


def a_run(folder: Path, rate: float) -> Path:
    """The records of a run of the tiny model, at `rate` tokens a second after a slow first step."""
    (folder / "base").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {depth: 2, width: 32, head_dim: 16, sequence_len: 64}\n")
    rows = [{"step": i, "time": i, "loss": 1.0, "tokens_per_second": rate if i > 1 else 1.0} for i in range(1, 9)]
    (folder / "base" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "eval").mkdir()
    (folder / "eval" / "done.json").write_text('{"seconds": 50.0}')
    return folder


def test_at_the_rates_of_a_run(tmp_path):
    speeds = plan.measured(a_run(tmp_path / "run", 1000.0))
    config = load_config(tmp_path / "run" / "config.yaml", None, ["base.tokens=1048576", "base.batch_tokens=1024"])
    made = plan.Plan(config, Machine("h100", 1), {**speeds, "": speeds["base"]})
    stages = {s.name: s for s in made.stages()}
    validation = (1 + -(-1024 // config.base.eval_every)) * config.base.eval_tokens / 3000
    assert stages["base"].seconds == pytest.approx(1048.576 + validation)
    assert stages["eval"].seconds == pytest.approx(50)  # the same depth: as long
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=4))
    deeper = plan.Plan(deeper, Machine("h100", 2), {**speeds, "": speeds["base"]})
    assert deeper.stages()[-1].seconds == pytest.approx(50 * deeper.each / made.each)


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, says in (
        (["--plan", "--gpu", "h1000"], "is not one of rtx4090"),
        (["--plan", "--count", "3"], "needs --gpu"),
        (["--plan", "--measured", str(tmp_path)], "is not a run directory"),
        (["--plan", "--gpu", "h100", "--measured"], "leave --gpu out"),
        (["--plan", "--measured", "model.dept=4"], "did you mean depth?"),
        (["--budget", "10", "--gpu", "h100"], "--budget needs --price"),
        (
            ["--plan", "--gpu", "h100", "--count", "7", "--config", str(ROOT / "configs" / "d12.yaml")],
            "cannot be shared",
        ),
    ):
        assert run_speedrun.main(argv) == 2
        out, err = capsys.readouterr()
        assert says in err and err.startswith("error: ") and err.count("\n") == 1, err
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="has no steps of the stage base"):
        plan.measured(tmp_path)


def test_nothing_is_known_of_a_machine_that_is_not_in_the_table(capsys):
    config = load_config(None, None, TINY)
    made = plan.Plan(config, Machine(None, 1))
    assert math.isnan(made.stages()[1].seconds)
    plan.show(made, footprint.estimated(made))
    assert "the time of base, mid, sft, rl, eval is not known" in capsys.readouterr().out
    known = plan.Plan(config, Machine(None, 1), {"": Speed(1e9, "guessed")})
    assert known.stages()[1].seconds > 0 and math.isnan(known.stages()[4].seconds)  # a CPU's bandwidth is not known


def test_the_run_can_be_planned_at_a_price_of_the_whole_machine():
    args = argparse.Namespace(gpu="a100", count=8, price=None)
    config = load_config(None, None, ["price_per_hour=14.32"])
    assert plan.machine(args.gpu, args.count, args.price, config).price == 14.32
