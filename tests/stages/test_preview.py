"""What the base model says while it is trained: the likeliest tokens, on a mesh as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.stage import BASE_PROMPTS, BASE_SAMPLE_TOKENS
from nanochat_jax.config import load_config
from nanochat_jax.mesh.sharding import AXES, tree_shardings
from nanochat_jax.model import scaling
from nanochat_jax.model.gpt import graph_of, init_params, merge
from nanochat_jax.stages.preview import preview
from nanochat_jax.stages.run import Run

SETTINGS = ["model.depth=2", "model.width=32", "model.head_dim=16", "model.sequence_len=64", "dtype=float32"]


class Letters:
    """A token a character, and <|bos|>."""

    bos, vocab_size = 0, 128

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def run_of(*more: str) -> Run:
    run = Run(None, load_config(None, None, [*SETTINGS, *more]), None, None)
    run.tokenizer = Letters()
    return run


@functools.cache
def forward(cfg):
    graph = graph_of(cfg, jnp.float32)
    return jax.jit(lambda params, tokens: merge(graph, params)(tokens))


def greedy(cfg, params, ids: list[int]) -> list[int]:
    """With all logits of every step."""
    ids = list(ids)
    for _ in range(BASE_SAMPLE_TOKENS):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(cfg)(params, padded)[0, len(ids) - 1].argmax()))
    return ids


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=["data", "data-fsdp-tensor"])
def test_the_likeliest_tokens_on_every_mesh(sizes):
    run = run_of("tracking.samples=2", *(f"mesh.{axis}={n}" for axis, n in zip(AXES, sizes)))
    cfg = scaling.gpt_config(run.config.model, 128)
    # a head that tells tokens apart: as it is made, all logits are nearly alike
    params = jax.tree.map(lambda p: 30 * p if p.ndim > 1 else p, init_params(cfg, 0))
    placed = jax.device_put(params, tree_shardings(params, run.mesh))
    lines = preview(run, placed)["sample"].split("\n")
    assert len(lines) == run.config.tracking.samples
    for prompt, line in zip(BASE_PROMPTS, lines):
        want = greedy(cfg, params, [0, *map(ord, prompt)])
        assert line == " ".join("".join(map(chr, want[1:])).split())


def test_a_context_shorter_than_a_prompt_shows_what_fits():
    run = run_of("tracking.samples=1", "model.sequence_len=16")
    params = init_params(scaling.gpt_config(run.config.model, 128), 0)
    line = preview(run, params)["sample"]
    assert BASE_PROMPTS[0].startswith(line[:14].rstrip())


def test_none_where_none_are_wanted():
    assert preview(run_of("tracking.samples=0"), {}) == {}
