"""Signatures: from JSON schema and back, calls, and what no signature says."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signature_reader import function_of

from nanochat_jax.signatures import Unsayable, call_text, functions_of, prompted, read_call, signature

TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["city: its name", "a\nb: c", "", "\n", '"']
)
NAMES = st.from_regex(r"\A[a-z_][a-zA-Z0-9_]{0,8}\Z") | st.sampled_from(["from", "user-id", "class", "é", "true", "b"])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
BOUNDS = st.fixed_dictionaries(
    {},
    optional={
        "description": TEXT,
        "title": TEXT,
        "default": JSON,
        "examples": st.lists(JSON, max_size=2),
        "minimum": NUMBERS,
        "maximum": NUMBERS,
        "minLength": st.integers(0, 9),
        "pattern": TEXT,
        "format": st.sampled_from(["date", "uri", "own"]),
        "nullable": st.booleans(),
        "const": JSON,
    },
)
VALUES = {"string": TEXT, "integer": st.integers(), "number": NUMBERS, "boolean": st.booleans(), "null": st.none()}
TYPES = st.sampled_from([*VALUES, "array", "object"])
SIMPLE = (
    TYPES.map(lambda t: {"type": t})
    | st.sampled_from(["string", "integer", "number", "boolean"]).flatmap(
        lambda t: st.lists(VALUES[t], min_size=1, max_size=3).map(lambda v: {"type": t, "enum": v})
    )
    | st.lists(JSON, max_size=3).map(lambda v: {"enum": v})
    | st.lists(TYPES, min_size=1, max_size=3, unique=True).map(lambda t: {"type": t})
    | st.booleans()
    | st.just({})
)


@st.composite
def objects(draw, inner):
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    schema = {"type": "object", "properties": properties}
    how = draw(st.sampled_from(["none", "in order", "in any order", "all"]))
    if how == "all":
        schema["required"] = list(properties)
    elif how != "none":
        chosen = draw(st.lists(st.sampled_from(list(properties)), unique=True)) if properties else []
        schema["required"] = [k for k in properties if k in chosen] if how == "in order" else chosen
    return schema | draw(st.fixed_dictionaries({}, optional={"additionalProperties": st.booleans() | inner}))


def more(inner):
    bounded = st.tuples(inner.filter(lambda s: isinstance(s, dict)), BOUNDS).map(lambda pair: {**pair[0], **pair[1]})
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    lists = inner.map(lambda of: {"type": "array", "items": of})
    dicts = inner.map(lambda of: {"type": "object", "additionalProperties": of})
    return bounded | unions | lists | dicts | objects(inner)


SCHEMAS = st.recursive(SIMPLE, more, max_leaves=8)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.from_regex(r"\A[a-zA-Z0-9_-]{1,20}\Z")},
    optional={"description": TEXT, "parameters": objects(SCHEMAS) | SCHEMAS},
)


@settings(max_examples=1000, deadline=None)
@given(FUNCTIONS)
def test_a_schema_comes_back_from_its_signature(function):
    text = signature(function)
    assert function_of(text) == function
    assert repr(function_of(text)) == repr(function_of(signature(function_of(text))))  # True is not 1


@given(st.from_regex(r"\A[a-zA-Z0-9_.-]{1,20}\Z"), st.dictionaries(NAMES | TEXT, JSON, max_size=4))
def test_a_call_comes_back_from_its_text(name, arguments):
    assert read_call(call_text(name, arguments)) == (name, arguments)


def test_a_signature_is_python():
    function = {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name"},
                "days": {"type": "integer", "minimum": 1, "default": 3},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "near": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    }
    function["parameters"]["properties"]["unit"]["default"] = "c"
    said = (
        'def weather(city: str, days: Annotated[int, {"minimum": 1}] = 3, unit: Literal["c", "f"] = "c", '
        'near: float | None = ...): "The weather of a city.\\ncity: its name"'
    )
    assert signature(function) == said and function_of(said) == function
    assert isinstance(ast.parse(said).body[0], ast.FunctionDef)
    assert call_text("weather", {"city": "Oslo", "days": 2}) == 'weather(city="Oslo", days=2)'


OUTSIDE = {
    "$ref": {"$ref": "#/$defs/a"},
    "oneOf": {"oneOf": [{}]},
    "not": {"not": {}},
    "patternProperties": {"type": "object", "patternProperties": {}},
}


@pytest.mark.parametrize("keyword", OUTSIDE)
@pytest.mark.parametrize("where", [lambda s: s, lambda s: {"type": "array", "items": s}, lambda s: {"anyOf": [s, {}]}])
def test_what_is_outside_of_the_subset_is_named_in_one_line(keyword, where):
    properties = {"x": where(OUTSIDE[keyword])}
    with pytest.raises(Unsayable) as e:
        signature({"name": "f", "parameters": {"type": "object", "properties": properties}})
    assert str(e.value) == f"f.x: {keyword} is not of the subset of JSON schema that a signature says"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ({"name": "a b"}, "the name 'a b' is not 1 to 64 letters, digits, _, - and ."),
        ({"name": "f", "strict": True}, "f: strict is no part of a signature"),
        ({"name": "f", "parameters": {"type": "text"}}, "f: type 'text' is unknown"),
        ({"name": "f", "parameters": []}, "f: [] is no schema"),
        ({"name": "f", "description": "\ud800"}, "f: not valid Unicode: a lone surrogate"),
    ],
)
def test_what_no_signature_says_is_named(function, why):
    with pytest.raises(Unsayable) as e:
        signature(function)
    assert str(e.value) == why


@pytest.mark.parametrize(
    "text", ["", "f(", "f", "1+2", "f(1)", "f(x=y)", "f(x=1, **{'x': 2})", "f(x=f())", "f(*[1])", "'a'.count('a')"]
)
def test_what_is_no_call_is_refused(text):
    with pytest.raises(ValueError, match=r"^not a (call|value): "):
        read_call(text)


@pytest.mark.parametrize("text", ["def f()", "def f(x: y): ...", "def f(*a): ...", "x = 1", "def f(x): return 1", ""])
def test_what_is_no_signature_is_refused(text):
    with pytest.raises(ValueError, match="^not a (signature|type|value)"):
        function_of(text)


def test_a_call_may_have_python_values():
    assert read_call("a-b(on=True, off=false, x=None, n=-1.5, l=['a', (1, 2)], d={'k': null})") == (
        "a-b",
        {"on": True, "off": False, "x": None, "n": -1.5, "l": ["a", [1, 2]], "d": {"k": None}},
    )


def test_a_prompt_has_what_a_schema_refers_to_and_names_what_it_leaves_out():
    schema = {
        "type": "object",
        "title": "Arguments",
        "additionalProperties": False,
        "$defs": {"Place": {"title": "Place", "type": "object", "properties": {"city": {"type": "string"}}}},
        "properties": {
            "to": {"$ref": "#/$defs/Place"},
            "way": {"oneOf": [{"type": "string"}, {"type": "null"}], "title": "Way"},
            "how": {"not": {"type": "string"}},
        },
        "required": ["way", "to"],
    }
    notes: set[str] = set()
    tool = {
        "type": "function",
        "function": {"name": "go", "description": "Goes.", "parameters": schema, "strict": True},
    }
    [function] = functions_of([tool, {"type": "web_search"}])
    said = 'def go(to: {"city": NotRequired[str]}, way: str | None, how: Any = ...): "Goes."'
    assert prompted(function, notes) == said and notes == {"not"}
