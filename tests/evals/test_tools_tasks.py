"""Tools that the model meets in its evaluation and has not learned, and thoughts with a budget."""

import random
import re

import pytest
from evals_fakes import ByteTokenizer
from signature_reader import function_of

from evals.tasks.thinking import WITHIN, Thinking
from evals.tasks.tools import Tools, run_call, same
from nanochat_jax.signatures import read_call
from tokenizer.chat import render

MANY = 300


def said(*calls, text="", outputs=None):
    parts = []
    for i, call in enumerate(calls):
        parts.append({"type": "python", "text": call})
        parts += [{"type": "python_output", "text": outputs[i]}] if outputs else []
    return [*parts, {"type": "text", "text": text}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_answer_is_right_by_its_own_calls_and_not_without_them(split):
    task, kinds, announced = Tools(split), set(), 0
    for i in range(MANY):
        c = task[i]
        own = c["messages"][-1]["content"]
        own = own if isinstance(own, list) else said(text=own)
        aspects = task.aspects(c, own)
        assert all(aspects.values()) and task.reward(c, own) == 1.0, (c, aspects)
        kinds.add((len(c["calls"]), *aspects))
        if c["calls"]:
            assert not task.aspects(c, [p for p in own if p["type"] == "text"])["calls"]
            at = [part["type"] for part in own].index("python")
            assert not task.aspects(c, [own[at], *own])["calls"]  # once too often
            text, wanted = own[at]["text"], c["calls"][0]
            assert read_call(text) == (wanted["name"], wanted["arguments"])
            assert task.caller(c).act(text) == wanted["result"] == own[at + 1]["text"]
            announced += at
            assert "error: " in task.caller(c).act(f"{wanted['name']}(no_such=1)")
        else:
            name = c["functions"][0]["name"]
            assert not task.aspects(c, said(f"{name}()", text=own[-1]["text"]))["no call"]
        system = c["messages"][0]["content"].split("\n")
        assert [function_of(line) for line in system] == c["functions"]
    assert 0 < announced < MANY
    assert kinds == {(0, "no call", "answer"), (1, "calls", "answer"), (2, "calls", "answer")}


def test_tested_tools_are_others_by_name_and_by_kind():
    sizes = {"train": 2000, "test": 400}
    train, test = ({f["name"] for i in range(n) for f in Tools(split)[i]["functions"]} for split, n in sizes.items())
    assert not train & test and len(train) > 2000 and len(test) > 30
    types = {p.get("type") for i in range(MANY) for f in Tools("test")[i]["functions"] for p in properties(f)}
    assert types == {"string", "integer", "number", "boolean", "array", "object"}
    counts = [len(Tools("train")[i]["messages"]) for i in range(MANY)]
    assert min(counts) == 3 and max(counts) == 7


def properties(function):
    return function["parameters"]["properties"].values()


def test_calls_are_compared_by_value():
    assert same(("f", {"a": "Oslo", "b": [1, {"c": True}]}), ("f", {"b": [1.0, {"c": True}], "a": "oslo"}))
    assert not same({"a": 1}, {"a": True}) and not same({"a": 1}, {"a": "1"}) and not same([1], [1, 1])


def test_a_tool_that_is_a_program_runs_in_the_sandbox():
    assert run_call("def f(x):\n    return x * 2\n", "f(x=1.5)") == "3.0"
    assert run_call("def f(x):\n    return x * 2\n", 'f(x={"a": null})').startswith("error: failed: TypeError")
    assert run_call("def f(x):\n    return open('/etc/passwd').read()\n", "f(x=1)").startswith("error: file refused")
    assert run_call("def f(x):\n    return x\n", "f(x=g())").startswith("error: not a value")
    seen = 0
    for i in range(MANY):
        c = Tools("test")[i]
        seen += any(call["name"] in c["programs"] for call in c["calls"])
    assert seen > 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_thoughts_keep_to_their_budget_and_the_question_is_the_same(split):
    task, tok = Thinking(split), ByteTokenizer()
    for i in range(90):
        c = task[i]
        thoughts = [p["text"] for p in c["messages"][-1]["content"] if p["type"] == "think"]
        assert bool(thoughts) == bool(c["budget"]) and task.evaluate(c, c["messages"][-1]["content"][-1]["text"])
        assert render(tok, c)
        if c["budget"]:
            line = "Think first." if c["budget"] is True else f"Think first, in at most {c['budget']} tokens."
            assert c["messages"][0] == {"role": "system", "content": line}
    if split == "test":
        questions = [[m["content"] for m in task[i]["messages"] if m["role"] == "user"] for i in range(6)]
        assert questions[0] == questions[1] == questions[2] != questions[3]
        assert [task[i]["subject"] for i in range(3)] == ["off", "on", f"within {WITHIN} tokens"]
        callers = [task.caller(task[i]) for i in range(3)]
        assert callers[:2] == [None, None] and callers[2].budget == WITHIN and not callers[2].names


def test_what_is_to_be_worked_out_is_said_in_words():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        c = Thinking("train")[rng.randrange(10_000)]
        think, call, *_ = c["messages"][-1]["content"]
        seen.add((call["text"], think["text"].split(". ")[-1]))
    assert any("times" in words and "plus" in words for _, words in seen)
    for call, words in seen:
        assert all(word in words.replace(",", "").replace(".", "").split() for word in re.findall(r"\d+", call))
