"""How the base model continues a few prompts while it is trained, a line each for the records."""

from evals.stage import BASE_PROMPTS, BASE_SAMPLE_TOKENS
from nanochat_jax.engine.engine import Engine, Request
from nanochat_jax.mesh import sharding
from nanochat_jax.model.gpt import graph_of, merge
from nanochat_jax.stages.run import Run

_CONTEXT = 128  # tokens of a prompt and what follows it, at most


def preview(run: Run, params: dict) -> dict:
    """{"sample": the text}, of the first tracking.samples prompts; {} where that is 0, and on several hosts."""
    tok, prompts, cfg = run.tokenizer, BASE_PROMPTS[: run.config.tracking.samples], run.gpt_config
    if not prompts or run.mesh.is_multi_process:
        return {}
    slots = -(-len(prompts) // sharding.data_parallel(run.mesh)) * sharding.data_parallel(run.mesh)
    length = min(cfg.sequence_len, _CONTEXT)
    engine = Engine(merge(graph_of(cfg, run.dtype), params), slots=slots, max_len=length, mesh=run.mesh)
    texts = [[tok.bos, *tok.encode(p)][: length - 1] for p in prompts]
    found = engine.generate([Request(ids, BASE_SAMPLE_TOKENS, temperature=0.0) for ids in texts])
    made = [[*ids[1:], *completion.ids] for ids, completion in zip(texts, found)]
    return {"sample": "\n".join(" ".join(tok.decode(ids).split()) for ids in made)}
