"""What stands in the middle of an answer: calls of the caller's tools, the calculator's, and thoughts with a budget."""

import json

import jsonschema_rs
import pytest
from evals_fakes import ByteTokenizer, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.engine.dialogue import Caller, Reader, converse, joined
from nanochat_jax.engine.engine import Completion, Engine
from nanochat_jax.engine.grammar import Vocabulary
from nanochat_jax.engine.sampling import Request, Shaping
from nanochat_jax.engine.tools import Tools, name_of
from nanochat_jax.signatures import read_call
from tokenizer.chat import Thinking, parse_completion, render

TOK = ByteTokenizer()
STOPS = (TOK.assistant_end, TOK.bos)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}, "required": ["city"]}


def called(text):
    return [TOK.python_start, *text.encode(), TOK.python_end]


def test_a_call_of_the_callers_ends_the_answer_and_another_is_calculated():
    state = Tools(TOK, {"weather", "f-1"}).start()
    for text in ('weather(city="a")', "f-1()"):
        *before, last = [state.push(id) for id in called(text)]
        assert not any(before) and last == [TOK.assistant_end]
    assert [state.push(id) for id in called("1+2")][-1] == [TOK.output_start, *b"3", TOK.output_end]
    assert [state.push(id) for id in called("len('weather(')")][-1] == [TOK.output_start, *b"8", TOK.output_end]
    assert not any(state.push(id) for id in called("other()"))
    assert name_of(" f-1 (x=1)") == "f-1" and name_of("1+2") == name_of("(1)") == ""


@pytest.mark.parametrize("budget, said", [(3, "<think> abc"), (5, "<think> abcde"), (1, "<think> a")])
def test_thoughts_are_closed_when_their_budget_is_spent(budget, said):
    state, ids = Tools(TOK, budget=budget).start(), list(b"<think> abcdefgh")
    for i, id in enumerate(ids):
        if forced := state.push(id):
            assert bytes(ids[: i + 1]).decode() == said and bytes(forced) == b" </think>"
            break
    else:
        pytest.fail("they were not closed")
    assert not any(state.push(id) for id in b" and so on, <think> as well")
    free = Tools(TOK, budget=budget).start()
    assert not any(free.push(id) for id in b"I <think> not")
    free = Tools(TOK).start()
    assert not any(free.push(id) for id in b"<think> for a long time")


PARTS = st.lists(
    st.tuples(st.sampled_from(["text", "think", "python", "python_output"]), st.text(st.characters(codec="ascii"))),
    max_size=5,
)


@given(PARTS)
def test_what_is_rendered_is_parsed_alike_whole_and_as_it_comes(parts):
    """Whatever a model says: the reader of a stream and the parser of the whole agree."""
    content = [{"type": kind, "text": text} for kind, text in parts]
    ids = render(TOK, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]})[0]
    ids = ids[ids.index(TOK.assistant_start) + 1 : -1]
    text, whole = parse_completion(TOK, ids)
    reader = Reader(TOK)
    pieces = [piece for id in ids for piece in reader.push(id)] + reader.flush()
    assert joined(pieces) == joined([(p["type"], p["text"]) for p in whole])
    assert text == "".join(p["text"] for p in whole if p["type"] == "text")


def test_thoughts_come_back_from_their_rendering():
    content = [
        {"type": "think", "text": "It rains? I ask."},
        {"type": "python", "text": "weather()"},
        {"type": "python_output", "text": "rain"},
        {"type": "think", "text": "So it does."},
        {"type": "text", "text": "Yes."},
    ]
    ids, mask = render(TOK, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]})
    begin = ids.index(TOK.assistant_start) + 1
    assert parse_completion(TOK, ids[begin:]) == ("Yes.", content)
    assert b"<think> So it does. </think> Yes." in bytes(i for i in ids if i < 256)
    assert [id for id, target in zip(ids[begin:], mask[begin:]) if not target] == [
        TOK.output_start,
        *b"rain",
        TOK.output_end,
    ]


def test_text_that_only_begins_like_a_mark_is_text():
    for text in ("<thin", "<thinker>", " <think>no</think>"):
        thinking = Thinking()
        pieces = [piece for char in text for piece in thinking.push(char)] + thinking.end()
        assert "".join(said for _, said in pieces) == text and {kind for kind, _ in pieces} == {"text"}


class Scripted:
    """An engine that says what a script has for a prompt's last bytes."""

    max_len = 100

    def __init__(self, script):
        self.script, self.asked = script, []

    def generate(self, requests):
        self.asked.append(requests)
        out = []
        for request in requests:
            key = next(key for key in self.script if list(request.ids)[-len(key) :] == list(key))
            ids = self.script[key][: request.max_new_tokens]
            out.append(Completion(list(ids), [1] * len(ids), "stop" if len(ids) == len(self.script[key]) else "length"))
        return out


def test_answers_go_on_behind_what_their_calls_gave():
    output = [TOK.output_start, *b"<rain>", TOK.output_end]
    script = {b"a": called("weather()"), b"b": list(b"hi"), tuple(output): list(b"It rains."), b"c": called("other()")}
    engine, given = Scripted(script), []

    def act(call):
        given.append(call)
        return "<rain>"

    callers = [Caller(frozenset({"weather"}), act), None, Caller(frozenset({"weather"}), act), None]
    requests = [Request(list(prompt), 50, stop_ids=STOPS) for prompt in (b"a", b"b", b"c", b"a")]
    done = converse(engine, TOK, requests, callers)
    assert done[0].ids == [*called("weather()"), *output, *b"It rains."] and given == ["weather()"]
    assert done[0].mask == [1] * 11 + [0] * len(output) + [1] * 9
    assert [c.ids for c in done[1:]] == [list(b"hi"), called("other()"), called("weather()")]
    [again] = engine.asked[1]
    assert again.ids == [*b"a", *called("weather()"), *output] and again.max_new_tokens == 50 - 11 - len(output)
    requests[0] = Request(list(b"a"), 15, stop_ids=STOPS)
    [short, *_] = converse(Scripted(script), TOK, requests, callers)
    assert short.ids == called("weather()") and short.finish_reason == "length"


def test_each_call_in_free_text_is_valid_and_is_answered():
    """A model whose words are nonsense, and that calls something whenever it may."""
    vocabulary, tools = Vocabulary(TOK), {"weather": SCHEMA, "now": {"type": "object", "properties": {}}}
    engine = Engine(tiny_model(sequence_len=256), slots=8, max_len=256)
    biases = ((TOK.python_start, 4.0), (ord("w"), 6.0), (ord("n"), 6.0), (ord("1"), 4.0))
    how = {"stop_ids": STOPS, "shaping": Shaping(bias=biases), "grammar": vocabulary.text(tools, Tools(TOK, tools))}
    done = engine.generate([Request([TOK.bos, *b"hi"], 120, seed=seed, **how) for seed in range(40)])
    own = calculated = 0
    for completion in done:
        parts = parse_completion(TOK, completion.ids)[1]
        for i, part in enumerate(parts):
            if part["type"] != "python" or i == len(parts) - 1 and completion.finish_reason == "length":
                continue
            if name_of(part["text"]) in tools:
                name, arguments = read_call(part["text"])
                jsonschema_rs.validate(tools[name], json.loads(json.dumps(arguments)))
                assert i == len(parts) - 1 and completion.finish_reason == "stop"
                own += 1
            else:
                assert set(part["text"]) <= set("0123456789+-*/()., ") or "(" in part["text"]
                calculated += [p["type"] for p in parts[i + 1 : i + 2]] == ["python_output"]
    assert own > 5 and calculated > 0
