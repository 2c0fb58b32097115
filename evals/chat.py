"""Tasks put to a chat model: multiple choice by the letters' logits, the rest by what it writes. And ChatCORE.

Multiple choice is not sampled: among the letters that a question offers, the likeliest right after the prompt is the
answer, which also a model that would rather chat can give. Generative tasks are answered greedily through the engine,
with its calculator, all questions in flight together. ChatCORE is the mean of accuracies centred at what guessing
scores, 0 at chance and 1 at best.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evals.scoring import Scorer
from evals.tasks.base import ScoredTask
from nanochat_jax.errors import UserError
from tokenizer.chat import parse_completion, render_prompt

SUBSET_SEED = 1337  # of the choice of max_per_task questions
CATEGORICAL_BLOCK = 1024  # questions rendered and scored at a time


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy over n independent questions."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def pick(n_questions: int, max_per_task: int | None) -> list[int]:
    """Which questions are asked: all, or an even draw of max_per_task, the same in every run."""
    if max_per_task is None or max_per_task >= n_questions:
        return list(range(n_questions))
    return sorted(random.Random(SUBSET_SEED).sample(range(n_questions), max_per_task))


def prompt_messages(conversation: dict) -> list[dict]:
    """A conversation up to its last user turn: what the model is asked."""
    messages = conversation["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


# --------------------------------------------------------------------------------------------------- answers


def answer_categorical(scorer: Scorer, tokenizer, conversations: Sequence[dict]) -> list[str]:
    """The letter that the model finds likeliest, for each conversation with its "letters"."""
    letter_ids: dict[str, int] = {}
    for letter in {letter for c in conversations for letter in c["letters"]}:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise ValueError(f"the letter {letter!r} is {len(ids)} tokens in this vocabulary; it must be one")
        letter_ids[letter] = ids[0]
    out = []
    for at in range(0, len(conversations), CATEGORICAL_BLOCK):
        block = conversations[at : at + CATEGORICAL_BLOCK]
        prompts = [render_prompt(tokenizer, prompt_messages(c)) for c in block]
        logits = scorer.last_logits(prompts, [[letter_ids[x] for x in c["letters"]] for c in block])
        out += [c["letters"][int(z.argmax())] for c, z in zip(block, logits)]
    return out


def answer_generative(
    engine, max_len: int, tokenizer, conversations: Sequence[dict], max_new_tokens: int
) -> list[dict]:
    """{"completion", "finish_reason", "tokens"} per conversation, greedily; "" where the prompt does not fit."""
    from nanochat_jax.engine import Request

    stop = (tokenizer.assistant_end, tokenizer.bos)
    out: list[dict] = [{"completion": "", "finish_reason": "prompt too long", "tokens": 0} for _ in conversations]
    prompts = [render_prompt(tokenizer, prompt_messages(c)) for c in conversations]
    fit = [i for i, ids in enumerate(prompts) if len(ids) < max_len]
    requests = [Request(prompts[i], max_new_tokens, temperature=0.0, stop_ids=stop) for i in fit]
    for i, done in zip(fit, engine.generate(requests)):
        text, _ = parse_completion(tokenizer, done.ids)
        out[i] = {"completion": text, "finish_reason": done.finish_reason, "tokens": len(done.ids)}
    return out


# ---------------------------------------------------------------------------------------------------- scores


def evaluate_chat_task(
    task,
    tokenizer,
    scorer: Scorer,
    engine=None,
    *,
    max_len: int | None = None,
    max_per_task: int | None = None,
    max_new_tokens: int = 512,
    records: Path | None = None,
) -> dict:
    """Accuracy of the model on a task, and its standard error; every question and verdict goes to `records`.

    The engine, of max_len tokens a row, is needed for generative tasks only.
    Returns accuracy, stderr, n, of (questions that the task has), baseline, centered, kind, and for generative tasks
    unfinished: the share of answers that met the token limit.
    """
    asked = pick(len(task), max_per_task)
    if not asked:
        raise ValueError(f"the task {task.name} has no questions")
    conversations = [task[i] for i in asked]
    if not isinstance(task, ScoredTask):
        raise UserError(f"task {task.name} holds conversations to learn from; there is nothing in it to score")
    if task.kind == "categorical":
        answers = [{"completion": a} for a in answer_categorical(scorer, tokenizer, conversations)]
    else:
        max_len = max_len or scorer.cfg.sequence_len
        answers = answer_generative(engine, max_len, tokenizer, conversations, max_new_tokens)
    # Threads: HumanEval's verdicts wait for processes; others take no time.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        verdicts = list(pool.map(lambda c, a: bool(task.evaluate(c, a["completion"])), conversations, answers))
    accuracy, n = sum(verdicts) / len(verdicts), len(verdicts)
    out = {
        "accuracy": accuracy,
        "stderr": standard_error(accuracy, n),
        "n": n,
        "of": len(task),
        "baseline": task.baseline,
        "centered": (accuracy - task.baseline) / (1 - task.baseline),
        "kind": task.kind,
    }
    if task.kind != "categorical":
        out["unfinished"] = sum(a["finish_reason"] != "stop" for a in answers) / n
    if records is not None:
        _write_records(records, asked, conversations, answers, verdicts)
    return out


def _write_records(path: Path, asked, conversations, answers, verdicts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        for i, conversation, answer, verdict in zip(asked, conversations, answers, verdicts):
            prompt = prompt_messages(conversation)[-1]["content"]
            record = {"index": i, "prompt": prompt, **answer, "correct": verdict}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(part, path)


def chatcore(results: dict[str, dict], members: Sequence[str]) -> dict:
    """{"score", "stderr", "tasks", "missing", "partial"}: the mean of the centred accuracies of `members`.

    Where a member was not evaluated it is the mean over all tasks that were, and partial: a score to follow, not one
    to compare.
    """
    missing = [name for name in members if name not in results]
    tasks = list(results if missing else members)
    if not tasks:
        return {"score": None, "stderr": None, "tasks": [], "missing": missing, "partial": True}
    variance = sum((results[t]["stderr"] / (1 - results[t]["baseline"])) ** 2 for t in tasks)
    return {
        "score": sum(results[t]["centered"] for t in tasks) / len(tasks),
        "stderr": math.sqrt(variance) / len(tasks),
        "tasks": tasks,
        "missing": missing,
        "partial": bool(missing),
    }
