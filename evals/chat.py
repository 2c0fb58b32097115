"""Tasks put to a chat model: multiple choice by the letters' logits, the rest by what it writes. And ChatCORE.

Multiple choice is not sampled: among the letters that a question offers, the likeliest right after the prompt is the
answer, which also a model that would rather chat can give. Generative tasks are answered greedily through the engine,
with its calculator, all questions in flight together; where pass@k is wanted, several more answers to each are drawn.
ChatCORE is the mean of accuracies centred at what guessing scores, 0 at chance and 1 at best.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals import passk, records
from evals.scoring import Scorer
from evals.significance import standard_error
from evals.tasks.base import ScoredTask, prompt_messages
from nanochat_jax.errors import UserError
from tokenizer.chat import parse_completion, render_prompt

SUBSET_SEED = 1337  # of the choice of max_per_task questions
CATEGORICAL_BLOCK = 1024  # questions rendered and scored at a time


def pick(n_questions: int, max_per_task: int | None) -> list[int]:
    """Which questions are asked: all, or an even draw of max_per_task, the same in every run.

    A draw of few is part of every larger one, so that runs with different limits have questions in common.
    """
    if max_per_task is None or max_per_task >= n_questions:
        return list(range(n_questions))
    return sorted(random.Random(SUBSET_SEED).sample(range(n_questions), n_questions)[:max_per_task])


# --------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Draws:
    """Further answers to every question of a generative task, for pass@k."""

    samples: int
    temperature: float
    seed: int = 0

    def seed_of(self, task: str, index: int, sample: int) -> int:
        """32 bits that depend on the run's seed, the task, the question and the sample, and on nothing else."""
        text = f"{self.seed} {task} {index} {sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


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
    engine,
    max_len: int,
    tokenizer,
    conversations: Sequence[dict],
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[Sequence[int]] | None = None,
) -> list[list[dict]]:
    """{"completion", "finish_reason", "tokens"} and, with tool calls, "parts", for each seed of each conversation.

    Without seeds it is one answer to each; "" where the prompt does not fit.
    """
    from nanochat_jax.engine.engine import Request

    stop = (tokenizer.assistant_end, tokenizer.bos)
    seeds = seeds or [(0,)] * len(conversations)
    out: list[list[dict]] = []
    requests, places = [], []
    for conversation, mine in zip(conversations, seeds, strict=True):
        ids = render_prompt(tokenizer, prompt_messages(conversation))
        out.append([{"completion": "", "finish_reason": "prompt too long", "tokens": 0} for _ in mine])
        if len(ids) < max_len:
            requests += [Request(ids, max_new_tokens, temperature, seed=seed, stop_ids=stop) for seed in mine]
            places += [(len(out) - 1, n) for n in range(len(mine))]
    for (question, n), done in zip(places, engine.generate(requests)):
        text, parts = parse_completion(tokenizer, done.ids)
        out[question][n] = {"completion": text, "finish_reason": done.finish_reason, "tokens": len(done.ids)}
        if any(part["type"] != "text" for part in parts):
            out[question][n]["parts"] = parts
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
    draws: Draws | None = None,
    path: Path | None = None,
) -> dict:
    """Accuracy of the model on a task, and its standard error; every question and verdict goes to the file `path`.

    The engine, of max_len tokens a row, is needed for generative tasks only.
    Returns accuracy, stderr, n, of (questions that the task has), baseline, centered, kind; for tasks with subjects
    `subjects` ({name: {accuracy, stderr, n}}) and `macro` (the mean of their accuracies, with its stderr); for
    generative tasks `unfinished`, the share of answers that met the token limit, and with draws `samples`,
    `temperature` and `pass_at_k`. Accuracy is of the greedy answers in any case.
    """
    asked = pick(len(task), max_per_task)
    if not asked:
        raise ValueError(f"the task {task.name} has no questions")
    conversations = [task[i] for i in asked]
    if not isinstance(task, ScoredTask):
        raise UserError(f"task {task.name} holds conversations to learn from; there is nothing in it to score")
    if task.kind == "categorical":
        answers = [[{"completion": a}] for a in answer_categorical(scorer, tokenizer, conversations)]
    else:
        room = engine, max_len or scorer.cfg.sequence_len, tokenizer, conversations, max_new_tokens
        answers = answer_generative(*room)
        if draws is not None:
            seeds = [[draws.seed_of(task.name, i, s) for s in range(draws.samples)] for i in asked]
            more = answer_generative(*room, draws.temperature, seeds)
            answers = [[*first, *others] for first, others in zip(answers, more)]
    _judge(task, conversations, answers)
    right = np.array([[a["correct"] for a in group] for group in answers])  # (Q, 1 + samples)
    accuracy, n = float(right[:, 0].mean()), len(right)
    out = {
        "accuracy": accuracy,
        "stderr": standard_error(accuracy, n),
        "n": n,
        "of": len(task),
        "baseline": task.baseline,
        "centered": (accuracy - task.baseline) / (1 - task.baseline),
        "kind": task.kind,
    }
    out |= by_subject([c.get("subject") for c in conversations], right[:, 0])
    if task.kind != "categorical":
        out["unfinished"] = sum(first["finish_reason"] != "stop" for first, *_ in answers) / n
        if draws is not None:
            out |= {"samples": draws.samples, "temperature": draws.temperature}
            out["pass_at_k"] = passk.estimates(right[:, 1:])
    if path is not None:
        groups = zip(asked, conversations, answers)
        records.write(path, (_record(i, c, first, others) for i, c, (first, *others) in groups))
    return out


def _judge(task: ScoredTask, conversations: Sequence[dict], answers: Sequence[list[dict]]) -> None:
    """Adds `correct`, and `reason` where there is one, to every answer."""

    def one(pair: tuple[dict, dict]) -> None:
        conversation, answer = pair
        correct, reason = task.judge(conversation, answer["completion"])
        answer["correct"] = bool(correct)
        if reason:
            answer["reason"] = reason

    # Threads: HumanEval's verdicts wait for processes; others take no time.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(one, ((c, a) for c, group in zip(conversations, answers) for a in group)))


def _record(index: int, conversation: dict, first: dict, others: list[dict]) -> dict:
    out = {"index": index, **records.asked(conversation), **first}
    return out | {"samples": others} if others else out


def by_subject(subjects: Sequence[str | None], right: np.ndarray) -> dict:
    """{"subjects", "macro"} of the verdicts on questions of these subjects; {} where none has one."""
    found = {}
    for subject in sorted({s for s in subjects if s}):
        mine = right[[s == subject for s in subjects]]
        accuracy, n = float(mine.mean()), len(mine)
        found[subject] = {"accuracy": accuracy, "stderr": standard_error(accuracy, n), "n": n}
    if not found:
        return {}
    accuracy = sum(s["accuracy"] for s in found.values()) / len(found)
    stderr = math.sqrt(sum(s["stderr"] ** 2 for s in found.values())) / len(found)
    return {"subjects": found, "macro": {"accuracy": accuracy, "stderr": stderr}}


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
