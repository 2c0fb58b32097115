"""Chat tasks end to end on a tiny model, and ChatCORE."""

import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from evals import chat, records
from evals.scoring import Scorer
from evals.stage import CHATCORE
from evals.tasks.base import FromRows, ScoredTask, prompt_messages
from evals.tasks.gsm8k import GSM8K
from evals.tasks.humaneval import HumanEval
from evals.tasks.identity import Identity
from evals.tasks.multiple_choice import ARC, MMLU, multiple_choice
from evals.tasks.spelling import SpellingBee
from nanochat_jax.engine.engine import Completion, Engine
from nanochat_jax.engine.tools import Tools
from nanochat_jax.errors import UserError
from tokenizer.chat import render_prompt

TOK = ByteTokenizer()


class Choices(FromRows):
    name, kind, baseline, columns = "choices", "categorical", 0.25, {}

    def conversation(self, row):
        letters = ["A", "B", "C", "D"][: 2 + row % 3]
        choices = [f"choice {c}" for c in letters]
        return multiple_choice(f"What is {row}?", letters, choices, letters[row % len(letters)])


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


def prompts_of(conversations):
    return [render_prompt(TOK, prompt_messages(c)) for c in conversations]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_multiple_choice_takes_the_likeliest_of_the_offered_letters(model, tmp_path):
    task, full = Choices(range(10)), FullLogits(model)
    want = []
    for i in range(len(task)):
        conversation = task[i]
        z = full(render_prompt(TOK, conversation["messages"][:-1]))[-1]
        best = conversation["letters"][int(np.argmax([z[ord(c)] for c in conversation["letters"]]))]
        want.append(best == conversation["messages"][-1]["content"])
    got = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), path=tmp_path / "r.jsonl")
    assert got["accuracy"] == np.mean(want) and got["n"] == got["of"] == 10 and "subjects" not in got
    found = records.read(tmp_path / "r.jsonl")
    assert [r["correct"] for r in found] == want and "What is 3?" in found[3]["prompt"]
    assert all(r["correct"] == (r["completion"] == r["expected"]) for r in found)
    assert len({r["id"] for r in found}) == 10 and [r["index"] for r in found] == list(range(10))


def test_chance_is_that_of_the_choices_that_are_offered(model):
    few, many = ([{"question": "?", "choices": list("abcdefghij")[:n], "answer": "b"}] * 3 for n in (4, 10))
    for rows, chance in ((few, 0.25), (many, 0.1), (few + many, 0.175)):
        got = chat.evaluate_chat_task(MMLU(rows), TOK, Scorer(model, 4))
        assert got["baseline"] == pytest.approx(chance)
        assert got["centered"] == pytest.approx((got["accuracy"] - chance) / (1 - chance))
    with pytest.raises(UserError, match="the letters 10 of a question are not one token each"):
        chat.answer_categorical(Scorer(model, 4), TOK, [[1]], [["10"]])
    with pytest.raises(UserError, match="no questions"):
        chat.evaluate_chat_task(MMLU([]), TOK, Scorer(model, 4))


class Subjects(Choices):
    """Questions of two subjects, and some of none."""

    def conversation(self, row):
        subject = {"subject": ["history", "physics"][row % 3]} if row % 3 < 2 else {}
        return super().conversation(row) | subject


def test_subjects_have_scores_of_their_own(model, tmp_path):
    got = chat.evaluate_chat_task(Subjects(range(30)), TOK, Scorer(model, 4), path=tmp_path / "r.jsonl")
    found = records.read(tmp_path / "r.jsonl")
    for subject in ("history", "physics"):
        right = [r["correct"] for r in found if r.get("subject") == subject]
        accuracy = float(np.mean(right))
        stderr = pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 10))
        assert got["subjects"][subject] == {"accuracy": pytest.approx(accuracy), "stderr": stderr, "n": 10}
    scores = list(got["subjects"].values())
    assert len(scores) == 2 and got["macro"]["accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in scores]))
    assert got["macro"]["stderr"] == pytest.approx(np.hypot(*(s["stderr"] for s in scores)) / 2)


def test_generative_answers_are_greedy_and_too_long_prompts_are_wrong(model):
    engine = Engine(model, slots=4, max_len=192, tool=Tools(TOK))
    conversations = [*(Echo(["?"] * 5)[i] for i in range(5)), {"messages": [{"role": "user", "content": "y" * 500}]}]
    answers = [one for [one] in chat.answer_generative(engine, TOK, prompts_of(conversations), 12)]
    assert [a["finish_reason"] for a in answers[:5]] == ["length"] * 5 and answers[0]["tokens"] == 12
    assert answers[-1] == {"completion": "", "finish_reason": "prompt too long", "tokens": 0}
    said = [a["completion"] for a in answers[:3]]
    task = Echo([said[0], "something else", said[2]])
    got = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), engine, max_new_tokens=12)
    assert got["accuracy"] == pytest.approx(2 / 3) and got["unfinished"] == 1.0
    assert got["stderr"] == pytest.approx(np.sqrt(2 / 9 / 3))


class AnyText(Echo):
    """Right is a first byte that is even; says why not."""

    def judge(self, conversation, completion):
        even = bool(completion) and ord(completion[0]) % 2 == 0
        return even, "" if even else "odd"


def test_samples_beside_greedy_answers_give_pass_at_k(model, tmp_path):
    engine = Engine(model, slots=4, max_len=192, tool=Tools(TOK))
    task, draws = AnyText(["-"] * 3), chat.Draws(4, 1.0, seed=7)
    how = {"max_new_tokens": 6, "draws": draws}
    got = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), engine, **how, path=tmp_path / "r")
    found = records.read(tmp_path / "r")
    prompts = prompts_of(task[i] for i in range(3))
    greedy = [one["completion"] for [one] in chat.answer_generative(engine, TOK, prompts, 6)]
    assert [r["completion"] for r in found] == greedy and got["accuracy"] == np.mean([r["correct"] for r in found])
    right = np.array([[s["correct"] for s in r["samples"]] for r in found])
    assert right.shape == (3, 4) and got["samples"] == 4 and got["temperature"] == 1.0
    assert got["pass_at_k"]["pass@1"]["value"] == pytest.approx(right.mean())
    assert got["pass_at_k"]["pass@4"]["value"] == pytest.approx(right.any(axis=1).mean())
    answers = [a for r in found for a in (r, *r["samples"])]
    assert all(a.get("reason", "") == ("" if a["correct"] else "odd") for a in answers)
    # a sample is a function of the seed, the task, the question and its number alone
    alone = chat.answer_generative(engine, TOK, prompts[2:], 6, 1.0, [[draws.seed_of("echo", 2, 3)]])
    assert alone[0][0]["completion"] == found[2]["samples"][3]["completion"]
    assert len({s["completion"] for r in found for s in r["samples"]}) > 6
    other = chat.evaluate_chat_task(task, TOK, Scorer(model, 4), engine, **how | {"draws": chat.Draws(4, 1.0, seed=8)})
    assert other["accuracy"] == got["accuracy"] and len({chat.Draws(1, 1.0, s).seed_of("a", 0, 0) for s in (7, 8)}) == 2


def test_a_lenient_score_stands_beside_the_strict_one(model, tmp_path):
    class Loose(AnyText):
        lenient = "any text"

        def admits(self, conversation, completion):
            return True

    engine = Engine(model, slots=4, max_len=192, tool=Tools(TOK))
    how = {"max_new_tokens": 6, "draws": chat.Draws(2, 1.0)}
    strict, both = (
        chat.evaluate_chat_task(task(["-"] * 3), TOK, Scorer(model, 4), engine, **how, path=tmp_path / "r")
        for task in (AnyText, Loose)
    )
    added = {"accuracy_lenient": 1.0, "stderr_lenient": 0.0, "lenient": "any text"}
    assert both == strict | added and not added.keys() & strict.keys()
    answers = [a for r in records.read(tmp_path / "r") for a in (r, *r["samples"])]
    assert all(a["correct_lenient"] for a in answers) and not all(a["correct"] for a in answers)
    assert all(("right by the lenient score" in records.remarks(a)) != a["correct"] for a in answers)


def test_records_keep_tool_calls_and_earlier_turns():
    ids = [*b"It is ", TOK.python_start, *b"1+1", TOK.python_end, TOK.output_start, *b"2", TOK.output_end, *b"2."]

    class Fixed:
        max_len = 192

        def generate(self, requests):
            return [Completion(ids, [1] * len(ids), "stop") for _ in requests]

    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1?"))]
    conversation = {"messages": [*turns, {"role": "assistant", "content": "2"}]}
    [[answer]] = chat.answer_generative(Fixed(), TOK, prompts_of([conversation]), 50)
    assert answer["completion"] == "It is 2." and records.said(answer) == "It is <<1+1=2>>2."
    asked = records.asked(conversation)
    assert asked["prompt"] == "user: Hi\n\nassistant: Yes?\n\nuser: 1+1?" and asked["expected"] == "2"
    assert asked["id"] == records.asked({"messages": turns})["id"] != records.asked({"messages": turns[:1]})["id"]


def test_records_are_read_as_they_were_written(tmp_path):
    written = [{"index": 0, "completion": "a\u2028b\x85c\nd"}, {"index": 1}]  # line ends of other kinds too
    records.write(tmp_path / "r.jsonl", written)
    assert records.read(tmp_path / "r.jsonl") == written and records.read(tmp_path / "none.jsonl") == []
    with open(tmp_path / "r.jsonl", "a") as f:
        f.write('{"index": ')
    with pytest.raises(UserError, match="r.jsonl, line 3 is not a record"):
        records.read(tmp_path / "r.jsonl")


def test_the_same_questions_are_picked_every_time():
    assert chat.pick(100, 10) == chat.pick(100, 10) and len(set(chat.pick(100, 10))) == 10
    assert set(chat.pick(100, 10)) < set(chat.pick(100, 11))  # few are part of many
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


def test_chatcore_of_the_published_runs():
    """The hundred-dollar run's figures, after mid and after SFT, and the ChatCORE that was published with them."""
    names = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"]
    baselines = [0.25, 0.25, 0.25, 0.0, 0.0]
    published = {0.0730: [0.3561, 0.2875, 0.3111, 0.0250, 0.0671], 0.0884: [0.3876, 0.2807, 0.3151, 0.0455, 0.0854]}
    for score, accuracies in published.items():
        scores = {name: result(a, base) for name, a, base in zip(names, accuracies, baselines)}
        assert chat.chatcore(scores, names)["score"] == pytest.approx(score, abs=5e-5)
    row = {k: "" for k in ("question", "choices", "answerKey", "answer", "prompt", "canonical_solution", "test")}
    tasks = [ARC([row], "arc_easy"), ARC([row], "arc_challenge"), MMLU([row]), GSM8K([row])]
    tasks += [HumanEval([{**row, "entry_point": ""}]), SpellingBee(["word"] * 50, "train", 1)]
    assert [(t.name, t.baseline) for t in tasks] == list(zip(CHATCORE, [*baselines, 0.0]))


def test_summary_leaves_out_what_was_not_measured():
    full = {"bpb": {"bpb": 1.23456}, "core": None, "chat": {"a": result(0.5)}, "chatcore": {"score": None}}
    assert records.summary(full) == {"bpb": 1.2346, "a": 0.5}
    full["chat"]["a"]["accuracy_lenient"] = 0.75
    assert records.summary(full) == {"bpb": 1.2346, "a": 0.5, "a_lenient": 0.75}


def test_a_task_with_nothing_to_score_is_an_error(model, tmp_path):
    with pytest.raises(UserError, match="identity holds conversations to learn from"):
        chat.evaluate_chat_task(
            Identity(), TOK, Scorer(model, 2), None, max_per_task=1, max_new_tokens=4, path=tmp_path / "r"
        )
