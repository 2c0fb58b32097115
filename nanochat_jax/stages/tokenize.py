"""The tokenizer: trained on the documents' training split and on some conversations, kept in the run directory."""

import itertools
import time
from collections.abc import Iterator

from nanochat_jax.chats import text_of
from nanochat_jax.checkpoint import write_done
from nanochat_jax.data.mixture import Mixture
from nanochat_jax.stages.finetune import load_tasks
from nanochat_jax.stages.run import Run
from tokenizer.evaluate import evaluate
from tokenizer.train import train_tokenizer

HELD_OUT_DOCUMENTS = 500  # of the validation split, for bytes per token
CONVERSATIONS = 8_000  # of those that mid will train on: in a small sample the words of the tasks become tokens


def conversation_texts(run: Run) -> Iterator[str]:
    """What is said in the first conversations of the mid stage."""
    conversations = Mixture(load_tasks(run, "mid"), seed=run.config.seed)
    for conversation in itertools.islice(conversations, CONVERSATIONS):
        for message in conversation.get("messages", ()):
            yield text_of(message["content"], "\n")


def main(run: Run) -> dict:
    began = time.perf_counter()
    out = run.dir / "tokenizer"
    texts = itertools.chain(conversation_texts(run), run.documents.train())
    stats = train_tokenizer(texts, out, run.config.tokenizer, log=run.log.say)
    held_out = list(itertools.islice(run.documents.val(), HELD_OUT_DOCUMENTS))
    compared = evaluate(run.tokenizer, held_out)
    done = {"seconds": time.perf_counter() - began, "metrics": {**stats, "bytes_per_token": compared}}
    write_done(out, done)
    return done
