"""CORE: how a base model does on 22 tasks, zero- or few-shot, from 0 (chance) to 1. DCLM, arXiv 2406.11794.

Prompts, the choice of few-shot examples and the order of the data are those of karpathy/nanochat, so that scores can be
compared with published ones, and so are the wrong answers that the bundle states as right. A task without its file is
left out and named, and the score is then marked partial: the mean over fewer tasks is another quantity.

    results = evaluate_core(scorer, tokenizer, "eval_bundle", max_per_task=100)
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evals.branches import Answer, common_prefix
from evals.scoring import Scorer
from evals.significance import mean_of, standard_error
from nanochat_jax.data.bundle import CoreTask, find_data, load_tasks
from nanochat_jax.errors import UserError

SHUFFLE_SEED = 1337  # of the order of a task's examples, from which max_per_task takes the first
FEWSHOT_SEED = 1234  # plus the example's index: of the choice of its few-shot examples
BLOCK = 512  # examples tokenized and scored at a time: bounds memory, leaves enough to sort by length
CONTEXTS = 10  # as many contexts long may a prompt be: the reference crops none, and its table of angles ends there
TASK_TYPES = ("multiple_choice", "schema", "language_modeling")
PER_TASK = ("results", "centered", "stderr", "n", "substitutes")  # of evaluate_core


def fewshot_indices(idx: int, n_examples: int, num_fewshot: int) -> list[int]:
    """Which other examples stand before example `idx`; at most as many as there are."""
    others = [i for i in range(n_examples) if i != idx]
    return random.Random(FEWSHOT_SEED + idx).sample(others, min(num_fewshot, len(others)))


def _texts(task_type: str, item: dict, delimiter: str) -> list[str]:
    """An example with each of its answers: the question with each choice, or each context with the continuation."""
    if task_type == "multiple_choice":
        return [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task_type == "schema":
        return [f"{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    if task_type == "language_modeling":
        return [f"{item['context'].strip()}{delimiter}{item['continuation']}"]
    raise UserError(f"CORE task type {task_type!r} is not one of {', '.join(TASK_TYPES)}")


def render_prompts(task_type: str, item: dict, delimiter: str, fewshot: list[dict]) -> list[str]:
    """The texts to score for one example: one for each answer, after the examples of `fewshot` with their right ones;
    for language_modeling the context alone (without white space at its end, which would be part of the next token) and
    with the continuation.
    """
    is_lm = task_type == "language_modeling"
    shots = [_texts(task_type, e, delimiter)[0 if is_lm else e["gold"]] for e in fewshot]
    before = "".join(f"{shot}\n\n" for shot in shots)
    prompts = [before + text for text in _texts(task_type, item, delimiter)]
    return [f"{before}{item['context'].strip()}{delimiter}".strip(), *prompts] if is_lm else prompts


def answer_spans(task_type: str, ids: list[list[int]]) -> list[Answer]:
    """(ids, start, end) to score for one example, from the ids of its prompts; no span is empty.

    multiple_choice: what follows the common prefix; schema: the common suffix; language_modeling: the second prompt
    where it goes beyond the first, which is the first's end unless a token straddles the two.
    """
    if task_type == "language_modeling":
        start = common_prefix(ids)
        return [(ids[1], min(start, len(ids[1]) - 1), len(ids[1]))]
    shortest = min(map(len, ids))
    if task_type == "multiple_choice":
        start = min(common_prefix(ids), shortest - 1)
        return [(s, start, len(s)) for s in ids]
    suffix = max(1, min(common_prefix([s[::-1] for s in ids]), shortest - 1))
    return [(s, len(s) - suffix, len(s)) for s in ids]


def load_examples(path: Path, max_per_task: int | None) -> list[dict]:
    """The examples of a task in their shuffled order, the first `max_per_task` of them where given."""
    with open(path, encoding="utf-8") as f:
        examples = [json.loads(line) for line in f if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task]


def evaluate_task(scorer: Scorer, tokenizer, task: CoreTask, examples: list[dict]) -> list[bool]:
    """Whether each example is answered right."""
    right = []
    for at in range(0, len(examples), BLOCK):
        indices = range(at, min(at + BLOCK, len(examples)))
        prompts = []
        for idx in indices:
            shots = [examples[i] for i in fewshot_indices(idx, len(examples), task.num_fewshot)]
            prompts.append(render_prompts(task.task_type, examples[idx], task.delimiter, shots))
        encoded = iter(tokenizer.encode_batch([p for ps in prompts for p in ps]))
        spans = [answer_spans(task.task_type, [[tokenizer.bos, *next(encoded)] for _ in ps]) for ps in prompts]
        scores = scorer.token_losses(spans, limit=CONTEXTS * scorer.cfg.sequence_len)
        for idx, answers, got in zip(indices, spans, scores, strict=True):
            if task.task_type == "language_modeling":
                (ids, _, end), best = answers[0], got[0].best
                right.append(best.tolist() == list(ids[end - len(best) : end]))
            else:
                chosen = int(np.argmin([float(g.nll.mean()) for g in got]))
                right.append(chosen == examples[idx]["gold"])
    return right


def evaluate_core(
    scorer: Scorer,
    tokenizer,
    bundle: str | Path,
    max_per_task: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """CORE over the tasks whose data are in `bundle`.

    Returns core_metric (mean of the centred accuracies, None without a task) and its stderr; per task results
    (accuracy), centered, stderr (of the accuracy), n; n_tasks of total_tasks; missing (tasks without data);
    substitutes (task: the file that stood in); partial: not all tasks, or not all with their own data.
    """
    bundle = Path(bundle)
    tasks = load_tasks(bundle)
    out: dict[str, Any] = {name: {} for name in PER_TASK} | {"missing": []}
    errors = []
    for task in tasks:
        path, stand_in = find_data(bundle, task)
        if path is None:
            out["missing"].append(task.label)
            say(f"CORE {task.label}: no {task.dataset_uri}, left out")
            continue
        started = time.monotonic()
        examples = load_examples(path, max_per_task)
        right = evaluate_task(scorer, tokenizer, task, examples)
        n, room = len(right), 1 - task.baseline
        accuracy = sum(right) / n
        centered, stderr = (accuracy - task.baseline) / room, standard_error(accuracy, n)
        errors.append(stderr / room)
        found = {"results": accuracy, "centered": centered, "stderr": stderr, "n": n}
        for name, value in (found | ({"substitutes": path.name} if stand_in else {})).items():
            out[name][task.label] = value
        say(
            f"CORE {task.label} ({task.num_fewshot}-shot, {n} examples): accuracy {accuracy:.4f}, "
            f"centred {centered:.4f}, {time.monotonic() - started:.1f} s"
        )
    out |= dict.fromkeys(("core_metric", "core_stderr"))
    if n := len(errors):
        out["core_metric"], out["core_stderr"] = mean_of([*out["centered"].values()], errors)
    out |= {"n_tasks": n, "total_tasks": len(tasks), "max_per_task": max_per_task}
    return out | {"partial": bool(out["missing"] or out["substitutes"])}
