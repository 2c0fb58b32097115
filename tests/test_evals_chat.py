"""Chat tasks end to end on a tiny model, ChatCORE, and the report's arithmetic."""

import json

import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from evals import chat
from evals.__main__ import summary
from evals.plots import moving_average
from evals.report import count, duration, table
from evals.scoring import Scorer
from evals.tasks.base import MultipleChoice, ScoredTask
from evals.tasks.identity import Identity
from nanochat_jax.calculator import CalculatorTool
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from tokenizer.chat import render_prompt

TOK = ByteTokenizer()


class Choices(MultipleChoice):
    def __init__(self, n):
        super().__init__("choices", range(n))

    def read(self, row):
        letters = ["A", "B", "C", "D"][: 2 + row % 3]
        return f"What is {row}?", letters, [f"choice {c}" for c in letters], letters[row % len(letters)]


class Echo(ScoredTask):
    """Right is what the model says greedily."""

    name, kind = "echo", "generative"

    def __init__(self, answers):
        self.answers = answers

    def __len__(self):
        return len(self.answers)

    def __getitem__(self, i):
        messages = [{"role": "user", "content": "x" * (3 + i)}, {"role": "assistant", "content": "-"}]
        return {"messages": messages, "answer": self.answers[i]}

    def evaluate(self, conversation, completion):
        return completion == conversation["answer"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_multiple_choice_takes_the_likeliest_of_the_offered_letters(model, tmp_path):
    task, full = Choices(10), FullLogits(model)
    want = []
    for i in range(len(task)):
        conversation = task[i]
        z = full(render_prompt(TOK, conversation["messages"][:-1]))[-1]
        best = conversation["letters"][int(np.argmax([z[ord(c)] for c in conversation["letters"]]))]
        want.append(best == conversation["messages"][-1]["content"])
    got = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), records=tmp_path / "r.jsonl")
    assert got["accuracy"] == np.mean(want) and got["n"] == got["of"] == 10
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["correct"] for r in records] == want and "What is 3?" in records[3]["prompt"]


def test_generative_answers_are_greedy_and_too_long_prompts_are_wrong(model):
    engine = Engine(model, slots=4, max_len=192, tool=CalculatorTool(TOK))
    conversations = [*(Echo(["?"] * 5)[i] for i in range(5)), {"messages": [{"role": "user", "content": "y" * 500}]}]
    answers = chat.answer_generative(engine, 192, TOK, conversations, 12)
    assert [a["finish_reason"] for a in answers[:5]] == ["length"] * 5 and answers[0]["tokens"] == 12
    assert answers[-1] == {"completion": "", "finish_reason": "prompt too long", "tokens": 0}
    said = [a["completion"] for a in answers[:3]]
    task = Echo([said[0], "something else", said[2]])
    got = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), engine, max_new_tokens=12)
    assert got["accuracy"] == pytest.approx(2 / 3) and got["unfinished"] == 1.0
    assert got["stderr"] == pytest.approx(np.sqrt(2 / 9 / 3))


def test_the_same_questions_are_picked_every_time():
    assert chat.pick(100, 10) == chat.pick(100, 10) and len(set(chat.pick(100, 10))) == 10
    assert chat.pick(5, 10) == [0, 1, 2, 3, 4] == chat.pick(5, None)


def result(accuracy, baseline=0.0):
    return {
        "accuracy": accuracy,
        "stderr": 0.1,
        "baseline": baseline,
        "centered": (accuracy - baseline) / (1 - baseline),
    }


def test_chatcore_is_the_mean_of_centred_accuracies():
    got = chat.chatcore({"a": result(0.625, 0.25), "b": result(0.2), "other": result(1.0)}, ["a", "b"])
    assert got["score"] == pytest.approx((0.5 + 0.2) / 2) and not got["partial"] and got["tasks"] == ["a", "b"]
    assert got["stderr"] == pytest.approx(np.hypot(0.1 / 0.75, 0.1) / 2)
    part = chat.chatcore({"a": result(0.25, 0.25), "other": result(1.0)}, ["a", "b"])
    assert part["score"] == 0.5 and part["partial"] and part["missing"] == ["b"]
    assert chat.chatcore({}, ["a"])["score"] is None


def test_summary_leaves_out_what_was_not_measured():
    full = {"bpb": {"bpb": 1.23456}, "core": None, "chat": {"a": result(0.5)}, "chatcore": {"score": None}}
    assert summary(full) == {"bpb": 1.2346, "a": 0.5}


def test_words_of_the_report():
    assert [duration(s) for s in (None, 5, 65, 3723)] == ["-", "5.0 s", "1 min 05 s", "1 h 02 min"]
    assert [count(n) for n in (None, 12, 1234, 12_345_678, 3e9)] == ["-", "12", "1.23 k", "12.3 M", "3 G"]
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |"
    assert moving_average([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_a_task_with_nothing_to_score_is_an_error(model, tmp_path):
    with pytest.raises(UserError, match="identity holds conversations to learn from"):
        chat.evaluate_chat_task(
            Identity(), TOK, Scorer(model, 2), None, max_per_task=1, max_new_tokens=4, records=tmp_path / "r"
        )
