"""Depth rules against the reference's table."""

import json
from dataclasses import asdict

import pytest

from conftest import golden_files
from nanochat_jax.config import ModelConfig
from nanochat_jax.model import scaling


def table_rows():
    for path in golden_files("scaling_table*.json"):
        table = json.loads(path.read_text())
        for depth, row in table["depths"].items():
            yield pytest.param(table["settings"], int(depth), row, id=f"{path.stem}-d{depth}")


@pytest.mark.parametrize("settings,depth,row", list(table_rows()))
def test_golden_scaling_table(settings, depth, row):
    model = ModelConfig(depth=depth, sequence_len=settings["sequence_len"], window_pattern=settings["window_pattern"])
    cfg = scaling.gpt_config(model, settings["vocab_size"])
    plan = scaling.plan(cfg, ratio=settings["target_param_data_ratio"], reference_decay=settings["weight_decay"])
    got = {
        "n_embd": cfg.n_embd,
        "n_head": cfg.n_head,
        **scaling.param_counts(cfg),
        "flops_per_token": scaling.flops_per_token(cfg),
        "target_tokens": plan.target_tokens,
        "total_batch_size": plan.batch_tokens,
        "num_iterations": plan.steps,
        "windows": list(cfg.windows),
    }
    assert {k: row[k] for k in got} == got
    for ours, theirs in (("lr_scale", "lr_scale"), ("adamw_lr_scale", "adamw_lr_scale"), ("weight_decay",) * 2):
        assert asdict(plan)[ours] == pytest.approx(row[theirs], rel=1e-12)


def test_golden_counts_and_flops(golden_modern):
    meta, cfg = golden_modern.meta, golden_modern.cfg
    assert scaling.param_counts(cfg) == meta["params"]
    assert scaling.flops_per_token(cfg) == meta["flops_per_token"]
    assert scaling.kv_bytes_per_token(cfg, 4) == meta["kv_bytes_per_token_fp32"]


def test_the_record_run():
    """d24 at ratio 8: 5568 steps of 2^20 tokens."""
    plan = scaling.plan(scaling.gpt_config(ModelConfig(depth=24), 32768), ratio=8)
    assert (plan.steps, plan.batch_tokens) == (5568, 2**20)


def test_the_hundred_dollar_run():
    """d20 classic at 20 tokens per parameter: 3.92e19 FLOPs."""
    cfg = scaling.gpt_config(ModelConfig(arch="classic", depth=20), 65536)
    plan = scaling.plan(cfg, ratio=20)
    assert plan.batch_tokens == 2**19 and plan.weight_decay == 0
    assert plan.tokens * scaling.flops_per_token(cfg) == pytest.approx(3.92e19, rel=0.01)
