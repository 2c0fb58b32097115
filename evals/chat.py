"""Scores of a chat model: accuracy on tasks, pass@k, and ChatCORE.

Multiple choice: the answer is the letter with the largest logit right after the prompt, among those that are offered.
Other tasks are answered greedily by the engine, with its calculator, in one continuous batch; for pass@k more answers
are sampled. ChatCORE is the mean of the accuracies centred at chance: 0 is chance, 1 is all right.
"""

import hashlib
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evals import records
from evals.scoring import Scorer
from evals.significance import mean_of, pass_estimates, standard_error
from evals.tasks.base import ScoredTask, Task, prompt_messages
from nanochat_jax.engine.dialogue import Caller, converse
from nanochat_jax.engine.engine import Request
from nanochat_jax.errors import UserError
from nanochat_jax.words import listed
from tokenizer.chat import parse_completion, render_prompt

SUBSET_SEED = 1337  # of the choice of max_per_task questions
SCORED_AT_A_TIME = 1024  # multiple-choice questions

IntRows = Sequence[Sequence[int]]  # of each prompt the ids, or the seeds of its answers


@dataclass(frozen=True)
class Draws:
    """Answers that are sampled, beside the greedy one, to every question of a generative task."""

    samples: int
    temperature: float
    seed: int = 0

    def seed_of(self, task: str, index: int, sample: int) -> int:
        """32 bits that depend on the run's seed, the task, the question and the sample, and on nothing else."""
        text = f"{self.seed} {task} {index} {sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def evaluate_chat_task(
    task: Task,
    tokenizer,
    scorer: Scorer,
    engine=None,
    *,
    max_per_task: int | None = None,
    max_new_tokens: int = 512,
    draws: Draws | None = None,
    path: Path | None = None,
) -> dict:
    """Accuracy of the model on a task, with its standard error; every question and verdict goes to the file `path`.

    Returns the scores of one task as evals/README.md has them. Generative tasks need an engine.
    """
    if not isinstance(task, ScoredTask):
        raise UserError(f"task {task.name} holds conversations to learn from; there is nothing in it to score")
    if not (asked := pick(len(task), max_per_task)):
        raise UserError(f"the task {task.name} has no questions")
    conversations = [task[i] for i in asked]
    if any("then" in c for c in conversations):
        conversations = hold(engine, tokenizer, conversations, max_new_tokens)
    prompts = [render_prompt(tokenizer, prompt_messages(c)) for c in conversations]

    if task.kind == "categorical":
        letters = answer_categorical(scorer, tokenizer, prompts, [c["letters"] for c in conversations])
        answers: list[list[dict[str, Any]]] = [[{"completion": letter}] for letter in letters]
    else:
        callers = [task.caller(c) for c in conversations]
        generate = partial(answer_generative, engine, tokenizer, prompts, max_new_tokens, callers=callers)
        answers = generate()
        if draws is not None:
            seeds = [[draws.seed_of(task.name, i, s) for s in range(draws.samples)] for i in asked]
            answers = [greedy + more for greedy, more in zip(answers, generate(draws.temperature, seeds))]

    right = _judge(task, conversations, answers)  # (questions, 1 + samples)
    score = _accuracy(right[:, 0])
    chance = task.chance(conversations)
    centered = (score["accuracy"] - chance) / (1 - chance)
    out = score | {"of": len(task), "baseline": chance, "centered": centered, "kind": task.kind}
    lengths = [greedy.get("tokens") for greedy, *_ in answers]
    out |= by_subject([c.get("subject") for c in conversations], right[:, 0], lengths)
    if aspects := _by_aspect([greedy.get("aspects", {}) for greedy, *_ in answers]):
        out["aspects"] = aspects
    if task.lenient:
        loose = _accuracy(np.array([greedy["correct_lenient"] for greedy, *_ in answers]))
        out |= {"accuracy_lenient": loose["accuracy"], "stderr_lenient": loose["stderr"], "lenient": task.lenient}
    if task.kind != "categorical":
        out["unfinished"] = sum(greedy["finish_reason"] != "stop" for greedy, *_ in answers) / len(answers)
        if draws is not None:
            out |= {"samples": draws.samples, "temperature": draws.temperature}
            out["pass_at_k"] = pass_estimates(right[:, 1:])
    if path is not None:
        lines = []
        for i, c, (greedy, *more) in zip(asked, conversations, answers):
            lines.append({"index": i, **records.asked(c), **greedy} | ({"samples": more} if more else {}))
        records.write(path, lines)
    return out


def pick(n_questions: int, max_per_task: int | None) -> list[int]:
    """Which questions are asked: all, or a uniform random subset of max_per_task, the same in every run.

    A draw of few is part of every larger one, so that runs with different limits have questions in common.
    """
    if max_per_task is None or max_per_task >= n_questions:
        return list(range(n_questions))
    return sorted(random.Random(SUBSET_SEED).sample(range(n_questions), n_questions)[:max_per_task])


def answer_categorical(scorer: Scorer, tokenizer, prompts: IntRows, letters: Sequence[Sequence[str]]) -> list[str]:
    """The letter that the model finds likeliest after each prompt (ids), of those offered with it."""
    ids = {letter: tokenizer.encode(letter) for letter in {x for offered in letters for x in offered}}
    if several := [letter for letter in ids if len(ids[letter]) != 1]:
        raise UserError(f"the letters {listed(several)} of a question are not one token each; name the choices A, B, C")
    out: list[str] = []
    for at in range(0, len(prompts), SCORED_AT_A_TIME):
        offered = letters[at : at + SCORED_AT_A_TIME]
        candidates = [[ids[letter][0] for letter in one] for one in offered]
        logits = scorer.last_logits(prompts[at : at + SCORED_AT_A_TIME], candidates)
        out += [one[int(z.argmax())] for one, z in zip(offered, logits)]
    return out


def answer_generative(
    engine,
    tokenizer,
    prompts: IntRows,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: IntRows | None = None,
    callers: Sequence[Caller | None] | None = None,
) -> list[list[dict[str, Any]]]:
    """{"completion", "finish_reason", "tokens"} and, with tool calls, "parts", for each seed of each prompt (ids).

    Without seeds there is one answer to each prompt. A prompt that leaves no room for an answer gets an empty one.
    callers: of each prompt, who runs its tools.
    """
    stop = (tokenizer.assistant_end, tokenizer.bos)
    asked = list(zip(prompts, seeds or [(0,)] * len(prompts), strict=True))
    of_each = callers or [None] * len(prompts)
    fit = [(p, seed, who) for (p, mine), who in zip(asked, of_each) for seed in mine if len(p) < engine.max_len]
    requests = [Request(p, max_new_tokens, temperature, seed=s, stop_ids=stop) for p, s, _ in fit]
    done = iter(converse(engine, tokenizer, requests, [who for *_, who in fit]))

    def answer(ids: Sequence[int]) -> dict[str, Any]:
        if len(ids) >= engine.max_len:
            return {"completion": "", "finish_reason": "prompt too long", "tokens": 0}
        completion = next(done)
        text, parts = parse_completion(tokenizer, completion.ids)
        more = {"parts": parts} if any(part["type"] != "text" for part in parts) else {}
        return {"completion": text, "finish_reason": completion.finish_reason, "tokens": len(completion.ids), **more}

    return [[answer(ids) for _ in mine] for ids, mine in asked]


def hold(engine, tokenizer, conversations: Sequence[dict], max_new_tokens: int) -> list[dict]:
    """Conversations in which the user says more (`then`, a list of texts), up to the last of it: the model has answered
    all that came before."""
    held = [{**c, "messages": list(c["messages"]), "then": list(c.get("then", ()))} for c in conversations]
    while going := [c for c in held if c["then"]]:
        prompts = [render_prompt(tokenizer, c["messages"]) for c in going]
        for c, [answer] in zip(going, answer_generative(engine, tokenizer, prompts, max_new_tokens)):
            content = answer.get("parts") or answer["completion"]
            c["messages"] += [{"role": "assistant", "content": content}, {"role": "user", "content": c["then"].pop(0)}]
    return held


def _judge(task: ScoredTask, conversations: Sequence[dict], answers: Sequence[list[dict]]) -> np.ndarray:
    """(questions, answers to each) bool; adds `correct`, and where there are such `correct_lenient` and `reason`, to
    every answer."""

    def judge(conversation: dict, answer: dict) -> None:
        said = answer.get("parts") or [{"type": "text", "text": answer["completion"]}]
        if aspects := task.aspects(conversation, said):
            answer["aspects"], correct = aspects, all(aspects.values())
            reason = ", ".join(f"{name}: wrong" for name, right in aspects.items() if not right)
        else:
            correct, reason = task.judge(conversation, answer["completion"])
        answer |= {"correct": bool(correct)} | ({"reason": reason} if reason else {})
        if task.lenient:
            answer["correct_lenient"] = bool(correct or task.admits(conversation, answer["completion"]))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # HumanEval's verdicts wait for processes
        list(pool.map(judge, *zip(*((c, a) for c, group in zip(conversations, answers) for a in group))))
    return np.array([[a["correct"] for a in group] for group in answers])


def _by_aspect(verdicts: Sequence[dict[str, bool]]) -> dict[str, dict]:
    names = dict.fromkeys(name for one in verdicts for name in one)
    return {name: _accuracy(np.array([one[name] for one in verdicts if name in one])) for name in names}


def _accuracy(right: np.ndarray) -> dict:
    accuracy, n = float(right.mean()), len(right)
    return {"accuracy": accuracy, "stderr": standard_error(accuracy, n), "n": n}


def by_subject(subjects: Sequence[str | None], right: np.ndarray, lengths: Sequence[int | None]) -> dict:
    """{"subjects", "macro"} of verdicts (Q,) on questions of these subjects, with the mean length of the answers where
    they have one; {} where none has a subject."""
    found: dict[str, dict] = {}
    for name in sorted({s for s in subjects if s}):
        own = [s == name for s in subjects]
        tokens = [n for n, mine in zip(lengths, own) if mine and n is not None]
        found[name] = _accuracy(right[own]) | ({"tokens": float(np.mean(tokens))} if tokens else {})
    if not found:
        return {}
    accuracy, stderr = mean_of(*([s[key] for s in found.values()] for key in ("accuracy", "stderr")))
    return {"subjects": found, "macro": {"accuracy": accuracy, "stderr": stderr}}


def chatcore(results: dict[str, dict], members: Sequence[str]) -> dict:
    """{"score", "stderr", "tasks", "missing", "partial"}: the mean of the centred accuracies of `members`.

    Where a member was not evaluated, it is the mean over all tasks that were, and partial: nothing to compare runs by.
    """
    missing = [name for name in members if name not in results]
    tasks = list(results if missing else members)
    errors = [results[t]["stderr"] / (1 - results[t]["baseline"]) for t in tasks]
    score, stderr = mean_of([results[t]["centered"] for t in tasks], errors) if tasks else (None, None)
    return {"score": score, "stderr": stderr, "tasks": tasks, "missing": missing, "partial": bool(missing) or not tasks}
