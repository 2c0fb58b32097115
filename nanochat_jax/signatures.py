"""Tools as Python says them: the signature of a function for its JSON schema, and calls with their arguments.

    def weather(city: str, days: int = 3): "The weather of a city.\\ncity: its name"
    weather(city="Oslo", days=2)

Values are JSON's, also true, false and null. A parameter with `= ...` may be left out. The lines at the end of a
docstring are about parameters. What a type does not say stands beside it: `Annotated[int, {"minimum": 1}]`.

The common subset of JSON schema is `type` (also a list), `properties`, `required`, `items`, `additionalProperties`,
`enum`, `anyOf`, and whatever bounds or describes one value (`PLAIN`). Nothing of it is lost: the tests read it back.
"""

import ast
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
TYPES |= {"array": "list", "object": "dict"}
PLAIN = {"title", "description", "default", "const", "examples", "format", "pattern", "nullable", "deprecated"}
PLAIN |= {"minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
PLAIN |= {"minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "readOnly", "writeOnly", "$schema"}
SUBSET = PLAIN | {"type", "properties", "required", "items", "additionalProperties", "enum", "anyOf"}
UNSAID = {"title", "$schema", "examples", "deprecated", "readOnly", "writeOnly", "$defs", "definitions"}  # in a prompt
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CALL = re.compile(r"\s*(?P<name>[a-zA-Z0-9_.-]{1,64})(?P<rest>\(.*)", re.DOTALL)
_ABSENT: Any = object()
_CONSTANTS = {"true": True, "false": False, "null": None}


class Unsayable(ValueError):
    """What of a schema no signature says."""


# ------------------------------------------------------------------------------------------------ schema to signature


def signature(function: Mapping) -> str:
    """The definition of a function (name, description, parameters as a JSON schema), in one line. Unsayable."""
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Unsayable(f"the name {name!r:.70} is not 1 to 64 letters, digits, _, - and .")
    if others := set(function) - {"name", "description", "parameters"}:
        raise Unsayable(f"{name}: {min(others)} is no part of a signature")
    if not isinstance(description, str | None):
        raise Unsayable(f"{name}: its description is no text")
    schema = function.get("parameters", _ABSENT)
    if schema is _ABSENT:
        parameters, docs = "**arguments", {}
    elif _is_plain(schema):
        docs = {k: s["description"] for k, s in schema["properties"].items() if _is_line(s)}
        if _read_doc(_doc(description, docs), list(schema["properties"])) != (description, docs):
            docs = {}
        parameters = _parameters(name, schema, docs)
    else:
        parameters, docs = f"**arguments: {_annotation(schema, name)}", {}
    doc = _doc(description, docs)
    if _read_doc(doc, list(schema["properties"]) if "**" not in parameters[:2] else []) != (description, docs):
        doc = f"{description}\n"
    text = f"def {name}({parameters}): {'...' if doc is None else _json(doc)}"
    if re.search("[\ud800-\udfff]", text):
        raise Unsayable(f"{name}: not valid Unicode: a lone surrogate")
    return text


def _is_plain(schema: Any) -> bool:
    """Whether an object's schema says no more than which parameters there are, by names that Python allows."""
    if not isinstance(schema, Mapping) or not set(schema) <= {"type", "properties", "required"}:
        return False
    known = isinstance(schema.get("properties"), Mapping) and schema.get("type") == "object"
    return known and _in_order(schema) and all(map(is_plain_name, schema["properties"]))


def is_plain_name(name: str) -> bool:
    """Whether a parameter of this name can be given as name=value."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name != "__debug__"


def _in_order(schema: Mapping) -> bool:
    """`required` is what types alone would say: the properties that have to be there, in their order, if any."""
    required = schema.get("required", _ABSENT)
    if required is _ABSENT:
        return True
    return bool(required) and required == [name for name in schema["properties"] if name in required]


def _parameters(name: str, schema: Mapping, docs: Mapping[str, str]) -> str:
    required, out, optional, star = schema.get("required", ()), list[str](), False, False
    for key, of in schema["properties"].items():
        said = {k: v for k, v in of.items() if k != "description" or key not in docs} if isinstance(of, Mapping) else of
        default = ""
        if key not in required:
            default = f" = {_json(said.pop('default'))}" if isinstance(said, dict) and "default" in said else " = ..."
        elif optional and not star:  # Python wants those with a default last, or named
            out, star = ["*", *out], True
        optional |= bool(default)
        out.append(f"{key}: {_annotation(said, f'{name}.{key}')}{default}")
    return ", ".join(out)


def _is_line(schema: Any) -> bool:
    """Whether a schema's description is one line."""
    text = schema.get("description") if isinstance(schema, Mapping) else None
    return isinstance(text, str) and bool(text) and "\n" not in text


def _doc(description: str | None, docs: Mapping[str, str]) -> str | None:
    lines = [*([] if description is None else [description]), *(f"{key}: {text}" for key, text in docs.items())]
    return "\n".join(lines) if lines else None


def _read_doc(doc: str | None, names: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """(the description, what is said of parameters) of a docstring."""
    if doc is None:
        return None, {}
    lines, left, found = doc.split("\n"), list(names), {}
    if len(lines) > 1 and not lines[-1]:  # so it says that no line before is about a parameter
        return "\n".join(lines[:-1]), {}
    while lines and left:
        key, colon, about = lines[-1].partition(": ")
        if not colon or not about or key not in left:
            break
        del left[left.index(key) :]
        found[key] = about
        lines.pop()
    return ("\n".join(lines) if lines else None), dict(reversed(found.items()))


def _annotation(schema: Any, where: str) -> str:
    """The type of a value."""
    if isinstance(schema, bool):
        return "object" if schema else "Never"
    if not isinstance(schema, Mapping):
        raise Unsayable(f"{where}: {schema!r:.40} is no schema")
    if others := [key for key in schema if key not in SUBSET]:
        raise Unsayable(f"{where}: {others[0]} is not of the subset of JSON schema that a signature says")
    base, said = _base(schema, where)
    rest = {key: value for key, value in schema.items() if key not in said}
    return f"Annotated[{base}, {_json(rest)}]" if rest else base


def _base(schema: Mapping, where: str) -> tuple[str, set[str]]:
    """A type without what stands beside it, and which keywords it says."""
    type, values, options = (schema.get(key) for key in ("type", "enum", "anyOf"))
    if isinstance(type, list):
        if not type or not all(isinstance(one, str) and one in TYPES for one in type):
            raise Unsayable(f"{where}: type {type!r:.40} is unknown")
        return f"Union[{', '.join(TYPES[one] for one in type)}]", {"type"}
    if type is None:
        if isinstance(options, list) and len(options) > 1:
            members = [_annotation(one, where) for one in options]
            shown = [f"Annotated[{m}, {{}}]" if _base_of(one) == "union" else m for m, one in zip(members, options)]
            return " | ".join(shown), {"anyOf"}
        return "Any", set()
    if not isinstance(type, str) or type not in TYPES:
        raise Unsayable(f"{where}: type {type!r:.40} is unknown")
    if isinstance(values, list) and values and all(_type_of(value) == type for value in values):
        return f"Literal[{', '.join(map(_json, values))}]", {"type", "enum"}
    if type == "array" and "items" in schema:
        return f"list[{_annotation(schema['items'], where)}]", {"type", "items"}
    properties = schema.get("properties")
    if type == "object" and isinstance(properties, Mapping) and properties:
        required, kept = schema.get("required", ()), {"required"} if _in_order(schema) else set()
        each = {key: _annotation(of, f"{where}.{key}") for key, of in properties.items()}
        if kept:
            each = {key: t if key in required else f"NotRequired[{t}]" for key, t in each.items()}
        fields = (f"{_json(key)}: {t}" for key, t in each.items())
        return f"{{{', '.join(fields)}}}", {"type", "properties", *kept}
    if type == "object" and properties is None and "additionalProperties" in schema:
        return f"dict[str, {_annotation(schema['additionalProperties'], where)}]", {"type", "additionalProperties"}
    return TYPES[type], {"type"}


def _base_of(schema: Any) -> str:
    """union where a schema is an anyOf and nothing else."""
    alone = isinstance(schema, Mapping) and set(schema) == {"anyOf"} and isinstance(schema["anyOf"], list)
    return "union" if alone and len(schema["anyOf"]) > 1 else ""


def _type_of(value: Any) -> str:
    """The type for whose enum `Literal` stands."""
    return {str: "string", int: "integer", bool: "boolean", float: "number"}.get(type(value), "")


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise Unsayable(f"not JSON: {e}") from None


# ------------------------------------------------------------------------------------------------ calls


def call_text(name: str, arguments: Mapping) -> str:
    """A call of a function."""
    if all(map(is_plain_name, arguments)):
        return f"{name}({', '.join(f'{key}={_json(value)}' for key, value in arguments.items())})"
    return f"{name}(**{_json(dict(arguments))})"


def _value_of(node: ast.AST | None) -> Any:
    """The JSON value that an expression is."""
    match node:
        case ast.Name(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Constant(bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(values) | ast.Tuple(values):
            return [_value_of(value) for value in values]
        case ast.Dict(keys, values):
            names = [_value_of(key) if key else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value_of, values)))
    raise ValueError(f"not a value: {ast.unparse(node) if node else 'nothing'}"[:120])


def read_call(text: str) -> tuple[str, dict]:
    """(name, arguments) of a call, with values as JSON or Python has them. ValueError where it is none."""
    found = _CALL.fullmatch(text.rstrip())
    try:
        tree = ast.parse(f"_{found['rest']}", mode="eval").body if found else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    match tree:
        case ast.Call(ast.Name("_"), [], given) if found:
            arguments: dict[str, Any] = {}
            for one in given:
                value = _value_of(one.value)
                more = {one.arg: value} if one.arg else value
                if not isinstance(more, dict) or set(more) & set(arguments):
                    break
                arguments |= more
            else:
                return found["name"], arguments
    raise ValueError(f"not a call: {text!r:.80}")


# ------------------------------------------------------------------------------------------------ in a prompt


def functions_of(tools: Any) -> list[dict]:
    """[{name, description, parameters}] of a list of tools in any of OpenAI's forms, without those of other kinds.
    ValueError."""
    found: dict[str, dict] = {}
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            continue
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError("tools: a function needs a name of at most 64 letters, digits, _ and -")
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(schema, Mapping):
            raise ValueError(f"tools: the parameters of {name} must be a JSON schema")
        about = function.get("description")
        found[name] = {"name": name, **({"description": about} if isinstance(about, str) and about else {})}
        found[name]["parameters"] = dict(schema)
    return list(found.values())


def prompted(function: Mapping, notes: set[str] | None = None) -> str:
    """The signature of a function for a prompt: without what no answer depends on, with what it refers to in its place.
    What no signature says is left out, and named in `notes`."""
    schema, left_out = function["parameters"], set() if notes is None else notes
    defined = {f"#/{at}/{k}": s for at in ("$defs", "definitions") for k, s in (schema.get(at) or {}).items()}

    def simple(of: Any, within: tuple = ()) -> Any:
        if not isinstance(of, Mapping):
            return of if isinstance(of, bool) else {}
        if (to := of.get("$ref")) is not None:
            if to in defined and to not in within:
                return simple({**defined[to], **{k: v for k, v in of.items() if k != "$ref"}}, (*within, to))
            left_out.add("$ref")
        of = {**of}
        if "oneOf" in of and "anyOf" not in of:
            of["anyOf"] = of.pop("oneOf")
        if isinstance(of.get("allOf"), list) and len(of["allOf"]) == 1 and isinstance(of["allOf"][0], Mapping):
            return simple({**of.pop("allOf")[0], **of}, within)
        left_out.update(key for key in of if key not in SUBSET | UNSAID | {"$ref"})
        out = {key: value for key, value in of.items() if key in SUBSET - UNSAID}
        if isinstance(out.get("additionalProperties"), bool):
            del out["additionalProperties"]
        for key in ("items", "additionalProperties"):
            if key in out:
                out[key] = simple(out[key], within)
        if isinstance(out.get("anyOf"), list):
            out["anyOf"] = [simple(one, within) for one in out["anyOf"]]
        if isinstance(out.get("properties"), Mapping):
            out["properties"] = {key: simple(one, within) for key, one in out["properties"].items()}
            required = out.pop("required", None) or ()
            wanted = [key for key in out["properties"] if key in required]
            out |= {"required": wanted} if wanted else {}
        return out

    known = simple(schema)
    if known.get("type", "object") == "object":
        known = {"type": "object", "properties": {}, **{k: v for k, v in known.items() if k != "description"}}
    return signature({**function, "parameters": known})
