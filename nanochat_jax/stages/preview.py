"""How the base model continues a few prompts while it is trained, a line each for the records.

Greedy and without a cache: every token costs a pass over a short row. That is one program, needs little memory, and is
cheap next to an evaluation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from evals.scoring import stack
from evals.stage import BASE_PROMPTS, BASE_SAMPLE_TOKENS
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import graph_of, merge
from nanochat_jax.stages.run import Run

_WIDTH = 64  # rows are padded to multiples of it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(graph, mesh, params, tokens, lengths):
    """tokens (R, T), the first lengths (R,) of each row given -> (R, T) with BASE_SAMPLE_TOKENS more behind them."""

    def local(params, tokens, lengths):
        model, rows = merge(graph, params), jnp.arange(len(tokens))

        def step(i, tokens):
            last = model.hidden(tokens)[rows, lengths + i - 1]
            return tokens.at[rows, lengths + i].set(model.logits(last).argmax(-1).astype(tokens.dtype))

        return jax.lax.fori_loop(0, BASE_SAMPLE_TOKENS, step, tokens)

    return sharding.each_row(local, mesh, leading=0)(params, tokens, lengths)


def preview(run: Run, params: dict) -> dict:
    """{"sample": the text}, of the first tracking.samples prompts; {} where that is 0."""
    tok, prompts = run.tokenizer, BASE_PROMPTS[: run.config.tracking.samples]
    if not prompts:
        return {}
    texts = [[tok.bos, *tok.encode(p)] for p in prompts]
    rows = -(-len(texts) // sharding.data_parallel(run.mesh)) * sharding.data_parallel(run.mesh)
    width = -(-(max(map(len, texts)) + BASE_SAMPLE_TOKENS) // _WIDTH) * _WIDTH
    lengths = np.array([len(ids) for ids in texts] + [1] * (rows - len(texts)), np.int32)
    placed = sharding.split_rows((stack(texts, (rows, width), tok.bos), lengths), run.mesh)
    found = sharding.to_host(_continue(graph_of(run.gpt_config, run.dtype), run.mesh, params, *placed))
    made = [found[i, 1 : len(ids) + BASE_SAMPLE_TOKENS].tolist() for i, ids in enumerate(texts)]
    return {"sample": "\n".join(" ".join(tok.decode(ids).split()) for ids in made)}
