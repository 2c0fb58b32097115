"""CORE: how a base model does on 22 tasks, zero- or few-shot, from 0 (chance) to 1. DCLM, arXiv 2406.11794.

The bundle is a folder of `core.yaml` (the tasks), `eval_meta_data.csv` (what chance scores) and `eval_data/` (JSON
lines). Prompts, the choice of few-shot examples and the order of the data are those of karpathy/nanochat, so that
scores compare with published ones; the work is batched. A task without its file is left out and named, and the score is
then marked partial: the mean over fewer tasks is another quantity.

    results = evaluate_core(scorer, tokenizer, "eval_bundle", max_per_task=100)
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from evals.scoring import Scorer
from nanochat_jax.config import RunConfig
from nanochat_jax.errors import UserError

SHUFFLE_SEED = 1337  # of the order of a task's examples, from which max_per_task takes the first
FEWSHOT_SEED = 1234  # plus the example's index: of the choice of its few-shot examples
BLOCK = 512  # examples tokenized and scored at a time: bounds memory, leaves enough to sort by length
TASK_TYPES = ("multiple_choice", "schema", "language_modeling")


@dataclass(frozen=True)
class CoreTask:
    """One entry of core.yaml."""

    label: str
    task_type: str  # of TASK_TYPES
    dataset_uri: str
    num_fewshot: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing, 0 to 1


def find_bundle(config: RunConfig) -> Path | None:
    """The folder of the CORE bundle that the settings name, or that the data folder holds; else None."""
    if config.evals.core_dir:
        return Path(config.evals.core_dir)
    folder = Path(config.data.dir) / "core" if config.data.dir else None
    return folder if folder is not None and (folder / "core.yaml").is_file() else None


# --------------------------------------------------------------------------------------------------- prompts


def fewshot_indices(idx: int, n_examples: int, num_fewshot: int) -> list[int]:
    """Which other examples stand before example `idx`; at most as many as there are."""
    others = [i for i in range(n_examples) if i != idx]
    return random.Random(FEWSHOT_SEED + idx).sample(others, min(num_fewshot, len(others)))


def render_prompts(task_type: str, item: dict, delimiter: str, fewshot: list[dict]) -> list[str]:
    """The texts to score for one example.

    multiple_choice: the question with each answer; schema: each context with the one continuation; language_modeling:
    the context alone (without white space at its end, which would be part of the next token) and with the continuation.
    """
    if task_type == "multiple_choice":
        shots = [f"{e['query']}{delimiter}{e['choices'][e['gold']]}" for e in fewshot]
        ends = [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    elif task_type == "schema":
        shots = [f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}" for e in fewshot]
        ends = [f"{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    elif task_type == "language_modeling":
        shots = [f"{e['context'].strip()}{delimiter}{e['continuation']}" for e in fewshot]
        asked = f"{item['context'].strip()}{delimiter}"
        ends = [asked, f"{asked}{item['continuation']}"]
    else:
        raise UserError(f"CORE task type {task_type!r} is not one of {', '.join(TASK_TYPES)}")
    before = "".join(f"{shot}\n\n" for shot in shots)
    prompts = [before + end for end in ends]
    if task_type == "language_modeling":
        prompts[0] = prompts[0].strip()
    return prompts


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading ids all sequences share."""
    shortest = min(map(len, sequences))
    for i in range(shortest):
        if any(s[i] != sequences[0][i] for s in sequences):
            return i
    return shortest


def answer_spans(task_type: str, ids: list[list[int]]) -> list[tuple[list[int], int, int]]:
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


# ------------------------------------------------------------------------------------------------------ data


def load_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks that core.yaml lists, in its order. UserError where the bundle is not one."""
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (bundle / name).is_file():
            raise UserError(f"no {name} in {bundle}: set evals.core_dir to the folder of the CORE bundle")
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        chance = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(f)}
    entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    missing = [t["label"] for t in entries if t["label"] not in chance]
    if missing:
        raise UserError(f"eval_meta_data.csv in {bundle} has no random baseline for {', '.join(missing)}")
    return [
        CoreTask(
            label=t["label"],
            task_type=t["icl_task_type"],
            dataset_uri=t["dataset_uri"],
            num_fewshot=t["num_fewshot"][0],
            delimiter=t.get("continuation_delimiter", " "),
            baseline=chance[t["label"]],
        )
        for t in entries
    ]


def find_data(bundle: Path, task: CoreTask) -> tuple[Path | None, bool]:
    """(file, whether it is a stand-in). `squad.subset.jsonl` stands in for a `squad.jsonl` that is not there."""
    path = bundle / "eval_data" / task.dataset_uri
    if path.is_file():
        return path, False
    others = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))
    return (others[0], True) if others else (None, False)


def load_examples(path: Path, max_per_task: int | None) -> list[dict]:
    """The examples of a task in their shuffled order, the first `max_per_task` of them where given."""
    with open(path, encoding="utf-8") as f:
        examples = [json.loads(line) for line in f if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task]


# ---------------------------------------------------------------------------------------------------- scores


def evaluate_task(scorer: Scorer, tokenizer, task: CoreTask, examples: list[dict]) -> tuple[list[bool], int]:
    """(whether each example was answered right, how many prompts were cropped to the context length)."""
    right: list[bool] = []
    cropped = 0
    for at in range(0, len(examples), BLOCK):
        indices = range(at, min(at + BLOCK, len(examples)))
        prompts = []
        for idx in indices:
            shots = [examples[i] for i in fewshot_indices(idx, len(examples), task.num_fewshot)]
            prompts.append(render_prompts(task.task_type, examples[idx], task.delimiter, shots))
        encoded = iter(tokenizer.encode_batch([p for ps in prompts for p in ps]))
        spans = []
        for ps in prompts:
            ids = [[tokenizer.bos, *next(encoded)] for _ in ps]
            spans.append(answer_spans(task.task_type, ids))
        flat = [s for example in spans for s in example]
        cropped += sum(len(ids) > scorer.cfg.sequence_len for ids, _, _ in flat)
        scores = iter(scorer.token_losses([ids for ids, _, _ in flat], [(s, e) for _, s, e in flat]))
        for idx, example in zip(indices, spans):
            got = [next(scores) for _ in example]
            if task.task_type == "language_modeling":
                ids, _, end = example[0]
                best = got[0].best
                right.append(best.tolist() == list(ids[end - len(best) : end]))
            else:
                losses = [float(g.nll.mean()) for g in got]
                right.append(losses.index(min(losses)) == examples[idx]["gold"])
    return right, cropped


def evaluate_core(
    scorer: Scorer,
    tokenizer,
    bundle: str | Path,
    max_per_task: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """CORE over the tasks whose data are in `bundle`.

    Returns core_metric (mean of the centred accuracies, None without a task) and its stderr; per task results
    (accuracy), centered, stderr (of the accuracy), n, cropped; n_tasks of total_tasks; missing (tasks without data);
    substitutes (task: the file that stood in); partial: not all tasks, or not all with their own data.
    """
    bundle = Path(bundle)
    tasks = load_tasks(bundle)
    out: dict = {"results": {}, "centered": {}, "stderr": {}, "n": {}, "cropped": {}, "substitutes": {}, "missing": []}
    variance = 0.0
    for task in tasks:
        path, stand_in = find_data(bundle, task)
        if path is None:
            out["missing"].append(task.label)
            say(f"CORE {task.label}: no {task.dataset_uri}, left out")
            continue
        started = time.monotonic()
        examples = load_examples(path, max_per_task)
        right, cropped = evaluate_task(scorer, tokenizer, task, examples)
        accuracy = sum(right) / len(right)
        stderr = math.sqrt(accuracy * (1 - accuracy) / len(right))
        centered = (accuracy - task.baseline) / (1 - task.baseline)
        variance += (stderr / (1 - task.baseline)) ** 2
        out["results"][task.label], out["centered"][task.label] = accuracy, centered
        out["stderr"][task.label], out["n"][task.label] = stderr, len(right)
        if cropped:
            out["cropped"][task.label] = cropped
        if stand_in:
            out["substitutes"][task.label] = path.name
        say(
            f"CORE {task.label} ({task.num_fewshot}-shot, {len(right)} examples): accuracy {accuracy:.4f}, "
            f"centred {centered:.4f}, {time.monotonic() - started:.1f} s"
        )
    n = len(out["results"])
    out["core_metric"] = sum(out["centered"].values()) / n if n else None
    out["core_stderr"] = math.sqrt(variance) / n if n else None
    out |= {"n_tasks": n, "total_tasks": len(tasks), "max_per_task": max_per_task}
    out["partial"] = bool(out["missing"] or out["substitutes"])
    return out
