"""Tools, calls and thoughts as others write them in their conversations, made into ours.

tools        OpenAI's list, its text, or an object a line; in a system message (`<tools>`, or just JSON)
calls        OpenAI's tool_calls; in what is said `<tool_call>{...}</tool_call>` (Hermes, Qwen), `<functioncall> {...}`
             (Glaive), `[name(key=value), ...]` alone (ToolACE)
thoughts     `<think>...</think>` before what is said

What has no meaning here is an `Unusable`.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from nanochat_jax.signatures import NAME, TYPES, Unsayable, call_text, functions_of, read_call

_CALLED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>|<functioncall>\s*(.*?)\s*(?:<\|endoftext\|>|$)", re.DOTALL)
_QUOTED = re.compile(r"'(\{.*\})'", re.DOTALL)  # arguments in a call of Glaive's
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_BRACKETED = re.compile(r"\s*(\[\s*[A-Za-z].*\))\s*\]\s*", re.DOTALL)
_LOOSE_NAME = re.compile(r"""(?<=[\[,])\s*([A-Za-z][^()\[\]"'=,{}]*)\(""")
_TYPES = {python: type for type, python in TYPES.items()} | {type: type for type in TYPES} | {"tuple": "array"}
_DECODE = json.JSONDecoder().raw_decode


class Unusable(Exception):
    """Why a row is no conversation."""


def decoded(given: Any, what: str) -> Any:
    """A value, or what its text is as JSON."""
    try:
        return json.loads(given) if isinstance(given, str) and given.strip() else given or []
    except (ValueError, RecursionError):
        raise Unusable(f"{what} that are not JSON") from None


def functions(given: Any) -> list[dict]:
    """The functions of a list of tools."""
    if isinstance(given, str) and (values := _values(given, 0)[0]):
        given = values[0] if len(values) == 1 else values
    given = decoded(given, "tools")
    given = [given] if isinstance(given, Mapping) else given
    if given and not isinstance(given, list):
        raise Unusable("tools that are no list")
    try:
        return [{**f, "parameters": _typed(f["parameters"])} for f in functions_of(list(map(_named, given or [])))]
    except ValueError as e:
        raise Unusable(str(e)) from None


def listed(prose: str) -> tuple[list[dict], str] | None:
    """(the functions that a system message lists as JSON, the rest of it); None where it lists none."""
    for begun in re.finditer(r"[\[{]", prose):
        values, end = _values(prose, begun.start())
        tools = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        if tools and all(
            isinstance(t, Mapping) and ("function" in t or "name" in t and "parameters" in t) for t in tools
        ):
            return functions(tools), re.sub("</?tools>", "", prose[: begun.start()] + prose[end:]).strip()
    return None


def _values(text: str, at: int) -> tuple[list, int]:
    """(the JSON values that stand one behind another from a place on, where they end)"""
    found, end = list[Any](), at
    while True:
        try:
            value, end = _DECODE(text, at)
        except (ValueError, RecursionError):
            return found, end
        found.append(value)
        at = re.compile(r"[\s,]*").match(text, end).end()  # type: ignore[union-attr]


def _named(tool: Any) -> Any:
    """A tool with a name that a call can have."""
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(of := tool.get("function"), Mapping):
        return {**tool, "function": _named(of)}
    kind = {"type": "function"} if tool.get("type") not in (None, "function") and "parameters" in tool else {}
    return {**tool, **kind, "name": _name(tool["name"])} if isinstance(tool.get("name"), str) else tool


def _name(name: str) -> str:
    return name if NAME.fullmatch(name) else re.sub("[^a-zA-Z0-9_.-]+", "_", name.strip())[:64]


def _typed(parameters: Mapping) -> Mapping:
    """A schema; where parameters stand alone, with types as Python names them ("str, optional"), one is made."""
    if parameters.get("type") == "dict":  # as ToolACE has it
        return _renamed(parameters)
    alone = parameters and all(isinstance(of, Mapping) for of in parameters.values())
    if not alone or "properties" in parameters or "anyOf" in parameters:
        return parameters
    properties, required = {}, []
    for name, of in parameters.items():
        said = str(of.get("type", ""))
        type = re.split(r"[,\[]", said)[0].strip().lower()
        properties[name] = {k: v for k, v in of.items() if k in ("description", "default", "enum", "items")}
        properties[name] |= {"type": _TYPES[type]} if type in _TYPES else {}
        if "optional" not in said and "default" not in of:
            required.append(name)
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _renamed(schema: Any) -> Any:
    """A schema with Python's names of types made JSON schema's."""
    if isinstance(schema, list):
        return list(map(_renamed, schema))
    if not isinstance(schema, Mapping):
        return schema
    return {k: _TYPES.get(v, v) if k == "type" and isinstance(v, str) else _renamed(v) for k, v in schema.items()}


def spoken(text: str) -> list[dict]:
    """What an assistant said, as parts."""
    parts = []
    if thought := _THOUGHT.match(text):
        parts, text = [{"type": "think", "text": thought[1].strip()}], text[thought.end() :]
    parts = [part for part in parts if part["text"]]
    if calls := _bracketed(text):
        return parts + calls
    at = 0
    for found in _CALLED.finditer(text):
        if said := text[at : found.start()].strip():
            parts.append({"type": "text", "text": said})
        given = decoded(found[1] or _QUOTED.sub(r"\1", found[2] or ""), "calls")
        parts += map(call, given if isinstance(given, list) else [given])
        at = found.end()
    rest = text[at:].strip() if at else text
    rest = rest.removesuffix("<|endoftext|>").rstrip() if rest.endswith("<|endoftext|>") else rest
    return [*parts, {"type": "text", "text": rest}] if rest or not parts else parts


def is_known(text: str) -> bool:
    """Whether all the calls in what an assistant said can be read."""
    try:
        return bool(spoken(text))
    except Unusable:
        return False


def _bracketed(text: str) -> list[dict]:
    """The calls of `[name(key=value), ...]`; none where the text is anything else."""
    if not _BRACKETED.fullmatch(text):
        return []
    try:
        [listing] = ast.parse(_LOOSE_NAME.sub(lambda found: f"{_name(found[1]).replace('.', '_')}(", text.strip())).body
        calls = [read_call(ast.unparse(one)) for one in listing.value.elts]  # type: ignore[attr-defined]
        return [{"type": "python", "text": call_text(*one)} for one in calls]
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        return []


def call(given: Any) -> dict:
    """A call in OpenAI's form, or its text, as a part; with its id."""
    given = decoded(given, "calls")
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without a name")
    arguments = function.get("arguments") or function.get("parameters") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise Unusable("a tool call whose arguments are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise Unusable("a tool call whose arguments are no object")
    try:
        return {"type": "python", "text": call_text(_name(function["name"]), arguments), "id": given.get("id")}
    except Unsayable as e:
        raise Unusable(f"a tool call whose arguments are {e}") from None
