"""Weights out and in: what others read is what we have, and what comes back is what went out."""

import json

import jax
import numpy as np
from flax import nnx

from nanochat_jax.engine import Engine, Request
from tokenizer.chat import render, render_prompt


def wanted(loaded, path, conversations, texts, tokens=64):
    """What `transformers_child.py` compares with, as path.json and path.npz; questions are the first messages."""
    tok, model = loaded.tokenizer, loaded.model
    length = model.cfg.sequence_len
    engine = Engine(model, slots=1, max_len=length)
    prompts = []
    for conversation in conversations:
        ids = render_prompt(tok, conversation[:1])
        request = Request(ids, tokens, temperature=0.0)
        prompts.append((conversation[:1], ids, engine.generate([request])[0].ids))
    forward = nnx.jit(lambda model, rows: model(rows))
    rows = [[*ids, *greedy, *[0] * (length - len(ids) - len(greedy))] for _, ids, greedy in prompts]
    logits = np.concatenate([np.asarray(forward(model, np.array([row]))) for row in rows])
    rendered = [(messages, *render(tok, {"messages": messages})) for messages in conversations]
    value = {"texts": [(t, tok.encode(t)) for t in texts], "conversations": rendered, "prompts": prompts}
    path.with_suffix(".json").write_text(json.dumps(value))
    np.savez(path.with_suffix(".npz"), logits=logits)
