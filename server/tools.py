"""Tools that a caller describes, and forms that an answer keeps to: from a request to a grammar, and from what the
model then says to OpenAI's tool calls."""

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from nanochat_jax.engine.grammar import Grammar, Vocabulary

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def functions(tools: Any) -> dict[str, dict]:
    """{name: schema of its arguments} of a request's tools that are functions, in both of OpenAI's forms."""
    found = {}
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, Mapping) and tool.get("type") == "function":
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError("tools: a function needs a name of at most 64 letters, digits, _ and -")
            schema = function.get("parameters") or {}
            if not isinstance(schema, Mapping):
                raise ValueError(f"tools: the parameters of {name} must be a JSON schema")
            found[name] = dict(schema)
    return found


def required(choice: Any, tools: Any) -> dict[str, dict] | None:
    """The functions of which one has to be called; None where text may be the answer. ValueError."""
    allowed = None
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        among = choice.get("allowed_tools") or choice
        choice, allowed = (among.get("mode"), among.get("tools")) if isinstance(among, Mapping) else (among, None)
    if choice in (None, "", "auto", "none"):
        return None
    given = functions(tools)
    if allowed is not None:
        given = {name: given[name] for name in functions(allowed) if name in given}
    if choice in ("required", "any"):
        if not given:
            raise ValueError(f"tool_choice is {choice!r}, and there is no function to call in tools")
        return given
    wanted = choice.get("function") or choice if isinstance(choice, Mapping) else None
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if name not in given:
        raise ValueError(f"tool_choice wants {name or choice!r}, which is none of the functions of tools"[:200])
    return {name: given[name]}


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

    def call(self, arguments: str) -> dict:
        """A tool call as OpenAI has it, with arguments so far."""
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
