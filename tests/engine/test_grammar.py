"""Answers that keep to a form, from a model whose words are nonsense: whatever it says fits, and is drawn as if among
what fits."""

import json
import random

import jsonschema_rs
import numpy as np
import pytest
from evals_fakes import ByteTokenizer, FullLogits, tiny_model

from nanochat_jax.engine import engine as engine_module
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.grammar import Vocabulary
from nanochat_jax.engine.sampling import Request
from server.tools import CallReader

TOK = ByteTokenizer()
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_len=512)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, slots=8, max_len=512)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(TOK)


def request(grammar, seed=0, limit=300, temperature=1.0, **how):
    stops = (TOK.assistant_end, TOK.bos)
    return Request([TOK.bos, *b"hi"], limit, temperature, seed=seed, stop_ids=stops, grammar=grammar, **how)


def validate(schema, text):
    """1e999 is a number of JSON, and nobody's float."""
    jsonschema_rs.validate(schema, json.loads(text, parse_float=lambda s: max(-1e300, min(1e300, float(s)))))


def schemas(n):
    """Schemas of the kinds that clients send, nested and with text that is not ASCII."""

    def one(rng, depth):
        leaves = [
            {"type": "string", "maxLength": rng.randint(0, 9)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": "^[a-f]{2,4}@[0-9]+$"},
            {"type": "string", "format": "date"},
            {"type": "integer", "minimum": -5, "maximum": 12},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["ja", "nein", "größe ✓", 3, None]},
            {"const": {"a": [1, "é"]}},
            {"type": ["string", "null"], "maxLength": 3},
        ]
        if depth == 0 or rng.random() < 0.4:
            return rng.choice(leaves)
        kind = rng.random()
        if kind < 0.3:
            low = rng.randint(0, 2)
            return {"type": "array", "items": one(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
        if kind < 0.4:
            return {"anyOf": [one(rng, depth - 1), one(rng, 0)]}
        keys = rng.sample(["name", "größe", "a b", 'q"', "x", "日本", "tags"], rng.randint(0, 4))
        of = {"type": "object", "properties": {k: one(rng, depth - 1) for k in keys}}
        return of | {"required": [k for k in keys if rng.random() < 0.6], "additionalProperties": rng.random() < 0.2}

    return [TREE, PERSON, *(one(random.Random(seed), 3) for seed in range(n - 2))]


def test_whatever_a_model_says_fits_the_schema(engine, vocabulary):
    asked = schemas(40)
    made = engine.generate([request(vocabulary.json(s), i, top_k=i % 3 * 20) for i, s in enumerate(asked)])
    for schema, completion in zip(asked, made):
        text = TOK.decode_bytes(completion.ids).decode()
        assert completion.finish_reason == "stop", (schema, text)
        validate(schema, text)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_neither_slices_nor_neighbours_change_an_answer(model, vocabulary, monkeypatch, how):
    asked = [request(vocabulary.json(PERSON), 7, **how), request(None, 8, limit=40), request(vocabulary.json(TREE), 9)]
    found = []
    for length in (1, 3, 32):
        monkeypatch.setattr(Engine, "_slice_length", lambda *_, n=length: n)
        engine = Engine(model, slots=8, max_len=512)
        found += [[c.ids for c in engine.generate(asked)], [engine.generate([r])[0].ids for r in asked]]
    assert all(ids == found[0] for ids in found[1:])


@pytest.mark.parametrize("top_k", [0, ByteTokenizer.vocab_size], ids=["plain", "filtered"])
def test_what_is_drawn_is_drawn_as_among_what_fits(engine, model, vocabulary, top_k):
    fits = sorted(b'"-0123456789')
    grammar = vocabulary.json({"anyOf": [{"type": "integer"}, {"type": "string"}]})
    logits = FullLogits(model)([TOK.bos, *b"hi"])[-1].astype(np.float64)
    p = np.exp(logits[fits] - logits[fits].max())
    p /= p.sum()
    drawn = engine.generate([request(grammar, seed, limit=1, top_k=top_k) for seed in range(2000)])
    counts = np.array([sum(c.ids[0] == id for c in drawn) for id in fits])
    assert counts.sum() == 2000
    spread = np.sqrt(2000 * p * (1 - p))
    assert (np.abs(counts - 2000 * p) <= 4 * spread + 2).all(), (counts, 2000 * p)


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "array", "minItems": 3, "items": PERSON}], ids=range(3))
def test_an_answer_ends_whole_within_its_limit(engine, vocabulary, schema):
    grammar = vocabulary.json(schema)
    room = {0: 40, 1: 30, 2: 140}[[PERSON, TREE].index(schema) if schema in (PERSON, TREE) else 2]
    for completion in engine.generate([request(grammar, seed, limit=room) for seed in range(24)]):
        assert completion.finish_reason == "stop" and len(completion.ids) <= room
        validate(schema, TOK.decode(completion.ids))
    [cut] = engine.generate([request(grammar, limit=4)])
    assert cut.finish_reason == "length" and len(cut.ids) == 4


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_what_is_whole_ends_where_more_would_need_more_room(engine, vocabulary, limit):
    grammar = vocabulary.json({"type": "number"})
    for completion in engine.generate([request(grammar, seed, limit=limit) for seed in range(60)]):
        assert completion.finish_reason == "stop" or completion.ids == [*b"-"][:limit]
        assert completion.finish_reason == "length" or json.loads(TOK.decode(completion.ids)) is not None


def test_a_call_is_python_and_its_arguments_fit(engine, vocabulary):
    whole = {**PERSON, "minProperties": 2}  # says more than which keys there are
    tools = {"greet": PERSON, "my-tool": whole, "now": {}, "tree": {**TREE, "$ref": "#/$defs/pair"}}
    tools["tree"]["$defs"] = TREE["$defs"] | {
        "pair": {"type": "object", "properties": {"a b": {"$ref": "#/$defs/node"}}}
    }
    for name, schema in tools.items():
        for completion in engine.generate([request(vocabulary.call({name: schema}), seed) for seed in range(8)]):
            assert completion.finish_reason == "stop"
            first, *ids, last = completion.ids
            assert (first, last) == (TOK.python_start, TOK.python_end)
            reader = CallReader()
            said = "".join(map(reader.push, TOK.decode(ids)))
            assert reader.name == name
            validate(schema, said)
    called = {called_name(c) for c in engine.generate([request(vocabulary.call(tools), s) for s in range(40)])}
    assert len(called) > 1 and called <= set(tools)


def called_name(completion):
    reader = CallReader()
    reader.push(TOK.decode(completion.ids))
    return reader.name


def test_log_probabilities_are_the_model_s_own(engine, model, vocabulary):
    [completion] = engine.generate([request(vocabulary.json(PERSON), logprobs=0)])
    ids = [TOK.bos, *b"hi", *completion.ids]
    want = -FullLogits(model).nll(ids)[2:]
    np.testing.assert_allclose([t.logprob for t in completion.logprobs], want, atol=2e-4)


def test_notes_in_a_schema_change_nothing(engine, vocabulary):
    noted = {"type": "object", "properties": {"format": {"type": "string", "format": "colour", "maxLength": 5}}}
    noted |= {"required": ["format"], "$defs": {"a": {"anyOf": [{"format": "iri", "const": {"format": "iri"}}, True]}}}
    asked = [
        request(vocabulary.json(noted)),
        request(vocabulary.json(True), limit=60),
        request(vocabulary.call({"f": noted})),
    ]
    for completion in engine.generate(asked):
        assert completion.finish_reason == "stop"
    assert '"format": ' in TOK.decode(engine.generate(asked[:1])[0].ids)


def test_what_cannot_be_kept_to_is_said(vocabulary):
    wrong = {"not": {"not": {}}, "strin": {"type": "strin"}, "no": {"$ref": "#/$defs/no"}, "regex": {"pattern": "("}}
    for word, schema in (*wrong.items(), ("empty", False)):
        with pytest.raises(ValueError, match=word) as e:
            vocabulary.json(schema)
        assert "\n" not in str(e.value)
    for arguments in (
        {"properties": {"x": {"pattern": "["}}},
        {"properties": [1]},
        {"required": [{}]},
        {"required": 3},
    ):
        with pytest.raises(ValueError):
            vocabulary.call({"f": {"type": "object", **arguments}})


@pytest.mark.parametrize(
    "said, name, arguments",
    [
        ("f()", "f", {}),
        (
            'f(a="x, (y) = \\"z\\"", b={"c": [1, ")"]}, c=null)',
            "f",
            {"a": 'x, (y) = "z"', "b": {"c": [1, ")"]}, "c": None},
        ),
        ('a.b-c(**{"x y": 1})', "a.b-c", {"x y": 1}),
        ('g(größe="\\u00e9\\\\")', "g", {"größe": "é\\"}),
    ],
)
def test_a_call_is_read_as_it_comes(said, name, arguments):
    for size in (1, 3, 100):
        reader, made = CallReader(), ""
        for at in range(0, len(said), size):
            made += reader.push(said[at : at + size])
        assert (reader.name, json.loads(made)) == (name, arguments)


def test_slices_are_short_where_much_is_thrown_away(engine, vocabulary):
    before = engine.counters.calls
    [completion] = engine.generate([request(vocabulary.json({"type": "array", "minItems": 20, "items": {"const": 7}}))])
    assert TOK.decode(completion.ids).startswith("[7, 7")
    assert engine.counters.calls - before < len(completion.ids) / 2  # what is forced comes in long slices
    assert engine_module.SHORT > 1
