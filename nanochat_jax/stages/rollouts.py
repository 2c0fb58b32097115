"""What RL learns from: questions of one task or several, samples of their answers, and rewards; pass@k."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.scoring import stack
from evals.significance import pass_estimates
from evals.tasks.base import ScoredTask, prompt_messages
from nanochat_jax.engine.dialogue import converse
from nanochat_jax.engine.engine import Completion, Engine, Request
from nanochat_jax.engine.tools import Tools
from nanochat_jax.stages import common
from nanochat_jax.stages.run import Run
from tokenizer.chat import parse_completion, render_prompt

TOO_LONG = "prompt too long"  # of a question that leaves no room for an answer: it is skipped, and its reward 0
_BUCKET = 128  # sequence lengths of the training batch are rounded up to multiples of this, to compile few shapes


@dataclass(frozen=True)
class Question:
    task: ScoredTask
    index: int  # in the task
    id: int  # among the questions of all tasks


class Questions:
    """The questions of several tasks in one order: of every sum(shares) in a row, shares[name] are of task `name`.

    The question at a place depends on the seed and the place alone. A task that is used up is shuffled anew.
    """

    def __init__(self, tasks: dict[str, ScoredTask], shares: dict[str, int], seed: int):
        self.tasks, self._shares, self._seed = tasks, shares, seed
        self._cycle = [(name, rank) for name, share in shares.items() for rank in range(share)]
        self._first = dict(zip(tasks, np.cumsum([0, *map(len, tasks.values())]).tolist()))

    def __len__(self) -> int:
        """Places until the first of the tasks is used up."""
        return min(len(self.tasks[name]) * len(self._cycle) // share for name, share in self._shares.items())

    def __getitem__(self, place: int) -> Question:
        turn, at = divmod(place, len(self._cycle))
        name, rank = self._cycle[at]
        epoch, i = divmod(turn * self._shares[name] + rank, len(self.tasks[name]))
        return self.question(name, int(common.permutation(self._seed, epoch, len(self.tasks[name]))[i]))

    def question(self, name: str, index: int) -> Question:
        return Question(self.tasks[name], index, self._first[name] + index)


@dataclass
class Rollouts:
    """Questions x samples: prompts (ids), completions and their rewards (Q, S)."""

    prompts: list[list[int]]
    completions: list[list[Completion]]
    rewards: np.ndarray

    @property
    def asked(self) -> np.ndarray:
        """(Q,) bool: which questions were not skipped."""
        return np.array([group[0].finish_reason != TOO_LONG for group in self.completions])

    def metrics(self, questions: Sequence[Question]) -> dict[str, float]:
        """Mean reward, of each task where there are several, mean length, and how many were cut off at the limit, of
        the questions that were asked; and how many were skipped."""
        asked = self.asked
        flat = [c for group, was_asked in zip(self.completions, asked) for c in group if was_asked]
        names = np.array([q.task.name for q in questions])
        each = {f"{n}/reward": _mean(self.rewards[asked & (names == n)]) for n in dict.fromkeys(names.tolist())}
        return {
            "reward": _mean(self.rewards[asked]),
            **(each if len(each) > 1 else {}),
            "completion_tokens": _mean([len(c.ids) for c in flat]),
            "truncated": _mean([c.finish_reason == "length" for c in flat]),
            "skipped": int((~asked).sum()),
        }


def _mean(values) -> float:
    """0 where there is none."""
    return float(np.mean(values)) if len(values) else 0.0


class Sampler:
    """Samples answers to questions with the current parameters, all in one batch over the mesh, and scores them."""

    def __init__(self, run: Run, model, slots: int):
        self.cfg, self.tok, self.log, self._warned = run.config.rl, run.tokenizer, run.log, False
        length, tool = run.config.model.sequence_len, Tools(run.tokenizer)
        self.engine = Engine(model, slots=slots, max_len=length, tool=tool, mesh=run.mesh)

    def __call__(
        self, params: dict, questions: Sequence[Question], samples: int, seed_of: Callable[[int, int], int]
    ) -> Rollouts:
        """seed_of(a question's id, sample) makes each sample a function of its place alone. A question whose prompt
        leaves no room for an answer gets empty ones, and no reward."""
        self.engine.update_params(params)
        conversations = [q.task[q.index] for q in questions]
        prompts = [render_prompt(self.tok, prompt_messages(c)) for c in conversations]
        fits = [len(p) < self.engine.max_len for p in prompts]
        self._warn([q for q, fit in zip(questions, fits) if not fit])
        like = Request(
            ids=[],
            max_new_tokens=self.cfg.max_new_tokens,
            temperature=self.cfg.temperature,
            top_k=self.cfg.top_k,
            stop_ids=(self.tok.assistant_end, self.tok.bos),
        )
        asked = [(q, p) for q, p, fit in zip(questions, prompts, fits) if fit]
        requests = [replace(like, ids=p, seed=seed_of(q.id, s)) for q, p in asked for s in range(samples)]
        callers = [q.task.caller(c) for q, c, fit in zip(questions, conversations, fits) if fit for _ in range(samples)]
        done = iter(converse(self.engine, self.tok, requests, callers))
        skipped = [Completion(finish_reason=TOO_LONG)] * samples
        completions = [[next(done) for _ in range(samples)] if fit else skipped for fit in fits]
        rewards = [
            [q.task.reward(c, parse_completion(self.tok, x.ids)[1]) if fit else 0.0 for x in group]
            for q, c, group, fit in zip(questions, conversations, completions, fits)
        ]
        return Rollouts(prompts, completions, np.asarray(rewards, np.float32))

    def _warn(self, skipped: Sequence[Question]) -> None:
        """Of the first questions that are skipped; metrics count them all."""
        if skipped and not self._warned:
            self._warned = True
            self.log.say(
                f"rl: question {skipped[0].index} of {skipped[0].task.name} leaves no room for an answer in "
                f"model.sequence_len={self.engine.max_len}; such questions are skipped, and counted in the metrics"
            )


def advantages(rewards: np.ndarray, zscore: bool) -> np.ndarray:
    """rewards (Q, S) less their question's mean; zscore: over their (population) standard deviation, unless it is 0."""
    advantage = rewards - rewards.mean(axis=1, keepdims=True)
    if zscore:
        deviation = rewards.std(axis=1, keepdims=True)
        advantage = advantage / np.where(deviation > 0, deviation, 1)
    return advantage


def training_batch(rollouts: Rollouts, end_id: int, pad_id: int, max_len: int, zscore: bool = False) -> dict:
    """tokens, targets (N, T) int32; share and weights (N, T) float32 such that sum(weights * nll) has the gradient.

    share = 1 / (sampled tokens of the question * questions that were asked), 0 where nothing was sampled:
    token-normalised within a question, as DAPO (arXiv 2503.14476) and the reference have it; weights = advantage *
    share. The end token counts as sampled where the model chose to stop.
    """
    rows, masks = [], []
    for prompt, group in zip(rollouts.prompts, rollouts.completions):
        for c in group:
            end = [end_id] if c.finish_reason == "stop" else []
            rows.append((prompt + c.ids + end)[: max_len + 1])
            masks.append(([0] * len(prompt) + c.mask + [1] * len(end))[: max_len + 1])
    longest = max(map(len, rows)) - 1
    width = min(-(-longest // _BUCKET) * _BUCKET, max_len) + 1
    tokens = stack(rows, (len(rows), width), pad_id)
    sampled = stack(masks, (len(rows), width), 0)[:, 1:].astype(bool)
    (questions, samples), asked = rollouts.rewards.shape, max(int(rollouts.asked.sum()), 1)
    count = np.maximum(sampled.reshape(questions, samples, -1).sum(axis=(1, 2)), 1)[:, None] * asked
    weight = (advantages(rollouts.rewards, zscore) / count).reshape(-1, 1)
    share = np.repeat(1 / count, samples, axis=1).reshape(-1, 1)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(sampled, tokens[:, 1:], -1),
        "weights": (weight * sampled).astype(np.float32),
        "share": (share * sampled).astype(np.float32),
    }


def pairs(rollouts: Rollouts) -> Rollouts:
    """Of each question the first right answer and the first wrong one, rewards 1 and 0; without both, two of one."""
    right = rollouts.rewards >= 1.0
    chosen = np.stack([right.argmax(axis=1), (~right).argmax(axis=1)], axis=1)
    completions = [[group[i] for i in row] for group, row in zip(rollouts.completions, chosen)]
    return Rollouts(rollouts.prompts, completions, np.take_along_axis(right, chosen, axis=1).astype(np.float32))


def minibatches(batch: dict, count: int) -> list[dict]:
    """The rows of a training batch in `count` parts, each weighed as if it were the whole."""
    parts = [dict(zip(batch, arrays)) for arrays in zip(*(np.split(a, count) for a in batch.values()))]
    return [{**p, "weights": p["weights"] * count, "share": p["share"] * count} for p in parts]


def pass_at_k(rewards: np.ndarray) -> dict[str, float]:
    """pass@k, as evals/significance.py estimates it, of rewards (Q, S) of which 1 and more is right."""
    return {name: found["value"] for name, found in pass_estimates(rewards >= 1.0).items()}
