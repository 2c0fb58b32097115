"""Tools that a caller describes, and forms that an answer keeps to: from a request to a grammar, and from what the
model then says to OpenAI's tool calls."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanochat_jax.engine.grammar import Grammar, Mixed, Vocabulary
from nanochat_jax.engine.tools import Tools
from nanochat_jax.signatures import functions_of

EFFORTS = {"none": 0.0, "minimal": 1 / 16, "low": 1 / 8, "medium": 1 / 4, "high": 1.0, "xhigh": 1.0}  # of the context


def _allowed(choice: Any) -> tuple[Any, list[str] | None]:
    """(the choice, the names that it is among, None for all) of a tool_choice."""
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return choice, None
    among = choice.get("allowed_tools") or choice
    if not isinstance(among, Mapping):
        return among, None
    return among.get("mode"), [f["name"] for f in functions_of(among.get("tools"))]


def offered(choice: Any, tools: Any) -> list[dict]:
    """The functions of a request's tools that its tool_choice lets the model call. ValueError."""
    choice, allowed = _allowed(choice)
    found = [] if choice == "none" else functions_of(tools)
    named = required(choice, tools) if isinstance(choice, Mapping) else None
    return [f for f in found if (allowed is None or f["name"] in allowed) and (named is None or f["name"] in named)]


def not_offered(choice: Any, tools: Any) -> list[str]:
    """What of a request's tools is left out: kinds that are no functions, where any might be called."""
    if choice == "none" or not isinstance(tools, list):
        return []
    kinds = (str(t.get("type", "function")) if isinstance(t, Mapping) else type(t).__name__ for t in tools)
    return sorted({kind for kind in kinds if kind != "function"})


def required(choice: Any, tools: Any) -> dict[str, dict] | None:
    """The functions of which one has to be called, {name: schema of its arguments}; None where text may be the answer.
    ValueError."""
    choice, allowed = _allowed(choice)
    if choice in (None, "", "auto", "none"):
        return None
    given = {f["name"]: f["parameters"] for f in functions_of(tools) if allowed is None or f["name"] in allowed}
    if choice in ("required", "any"):
        if not given:
            raise ValueError(f"tool_choice is {choice!r}, and there is no function to call in tools")
        return given
    wanted = choice.get("function") or choice if isinstance(choice, Mapping) else None
    name = str(wanted.get("name")) if isinstance(wanted, Mapping) else ""
    if name not in given:
        raise ValueError(f"tool_choice wants {name or choice!r}, which is none of the functions of tools"[:200])
    return {name: given[name]}


def thinking(effort: Any, on: Any, budget: Any, context: int) -> bool | int:
    """Whether to think first; a number: in so many tokens. A budget says more than on, and that more than an effort,
    which is a share of the context. ValueError."""
    if effort is not None and (not isinstance(effort, str) or effort not in EFFORTS):
        raise ValueError(f"reasoning_effort: {', '.join(EFFORTS)} are known, not {effort!r:.40}")
    if on not in (None, True, False):
        raise ValueError(f"enable_thinking is true or false, not {on!r:.40}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise ValueError(f"thinking_budget is a number of tokens, not {budget!r:.40}")
    if on is False or budget == 0:
        return False
    if budget is not None:
        return budget
    share = EFFORTS[effort] if effort is not None else 0.0
    return True if on or share == 1.0 else int(share * context) if context else share > 0


def fitting(functions: Sequence[Mapping], fits: Callable[[Sequence[Mapping]], bool]) -> tuple[list[Mapping], list[str]]:
    """(those functions of which a prompt can tell, what is left out of them): where not all fits descriptions go, those
    of parameters first, then whole functions, the last ones first."""
    left_out: list[str] = []
    now = list(functions)
    for what, shorter in (("parameters.description", _without_parameters_said), ("description", _without_description)):
        if not fits(now):
            now, left_out = [shorter(f) for f in now], [f"tools.{what}"]
    while now and not fits(now):
        left_out.append(f"tools.{now.pop()['name']}")
    return now, left_out


def _without_description(function: Mapping) -> dict:
    return {key: value for key, value in function.items() if key != "description"}


def _without_parameters_said(function: Mapping) -> dict:
    schema = function["parameters"]
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return dict(function)
    bare = {k: _without_description(of) if isinstance(of, Mapping) else of for k, of in properties.items()}
    return {**function, "parameters": {**schema, "properties": bare}}


def schema_of(form: Any) -> Mapping | bool | None:
    """The JSON schema that a response_format, or a text.format, wants; None for text. ValueError."""
    kind = form.get("type") if isinstance(form, Mapping) else form
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        given = form.get("json_schema") or form
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if not isinstance(schema, (Mapping, bool)):
            raise ValueError("response_format: json_schema needs a schema")
        return schema
    raise ValueError(f"response_format: text, json_object and json_schema are known, not {kind!r:.40}")


def free_grammar(
    vocabulary: Vocabulary, functions: Sequence[Mapping], machine: Tools
) -> tuple[Mixed | None, list[str]]:
    """(what keeps the calls in a text to functions and their schemas, those schemas that it cannot keep to)"""
    if not functions:
        return None, []
    schemas, left_out = {f["name"]: f["parameters"] for f in functions}, []
    for name, schema in schemas.items():
        try:
            vocabulary.call({name: schema})
        except (ValueError, RecursionError):
            schemas[name] = {"type": "object"}
            left_out.append(f"tools.{name}.parameters")
    return vocabulary.text(schemas, machine), left_out


def grammar_of(vocabulary: Vocabulary, tools: Mapping[str, Mapping] | None, schema: Any) -> Grammar:
    """What keeps an answer to a call of one of the tools, else to JSON by the schema. ValueError."""
    try:
        return vocabulary.call(tools) if tools else vocabulary.json(schema)
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else e
        raise ValueError(f"{'tools' if tools else 'response_format'}: {why}") from None


class CallReader:
    """Turns `name(key=value, ...)`, as it comes, into a name and the text of a JSON object."""

    def __init__(self) -> None:
        self.id, self.name = f"call_{uuid.uuid4().hex[:24]}", ""
        self._state, self._key, self._keys, self._depth = "name", "", 0, 0
        self._quoted = self._escaped = False

    @property
    def begun(self) -> bool:
        """Something of the object has been said."""
        return self._keys > 0 or self._state != "name" and self._key == "**"

    @property
    def opened(self) -> bool:
        return self._state != "name"

    def call(self, arguments: str) -> dict:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}

    def push(self, text: str) -> str:
        """What the object's text goes on with; nothing before the name is whole."""
        return "".join(map(self._next, text))

    def _next(self, char: str) -> str:
        if self._state == "name":
            self._state, self.name = ("key", self.name) if char == "(" else ("name", self.name + char)
            return ""
        if self._state == "key":
            return self._next_of_key(char)
        if self._state == "end" or self._depth == 0 and not self._quoted and char in ",)":
            return self._after_value(char)
        if self._quoted:
            self._quoted, self._escaped = char != '"' or self._escaped, char == "\\" and not self._escaped
        else:
            self._quoted = char == '"'
            self._depth += (char in "{[") - (char in "}]")
        return char

    def _next_of_key(self, char: str) -> str:
        if char == ")":
            self._state = "end"
            return "{}"
        if char == "=":
            key, self._key, self._state, self._keys = self._key, "", "value", self._keys + 1
            return ("{" if self._keys == 1 else ", ") + json.dumps(key) + ": "
        self._key = (self._key + char).lstrip()
        if self._key == "**":
            self._state = "value"
        return ""

    def _after_value(self, char: str) -> str:
        if char == ",":
            self._state = "key"
            return ""
        closed, self._state = self._state == "end" or self._key == "**", "end"
        return "" if closed else "}"
