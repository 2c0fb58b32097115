"""The schema of a signature, to prove that a signature loses nothing."""

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat_jax.signatures import _ABSENT, TYPES, _read_doc, _type_of, _value_of

_NAMES = {name: type for type, name in TYPES.items()}
_DEFINITION = re.compile(r"def (?P<name>[a-zA-Z0-9_.-]{1,64})(?P<rest>\(.*)", re.DOTALL)


def function_of(text: str) -> dict:
    """The function (name, description, parameters) of a signature. ValueError where it is none."""
    found = _DEFINITION.fullmatch(text.strip())
    try:
        tree = ast.parse(f"def _{found['rest']}").body if found else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = []
    match tree:
        case [ast.FunctionDef(args=args, body=[ast.Expr(ast.Constant(doc))])] if found:
            parameters, descriptions = _schema_of_arguments(args), dict[str, str]()
            function: dict[str, Any] = {"name": found["name"]}
            if isinstance(doc, str):
                description, descriptions = _read_doc(doc, [a.arg for a in (*args.args, *args.kwonlyargs)])
                function |= {} if description is None else {"description": description}
            for key, about in descriptions.items():
                parameters["properties"][key]["description"] = about
            return function | ({} if parameters is _ABSENT else {"parameters": parameters})
    raise ValueError(f"not a signature: {text!r:.80}")


def _schema_of_arguments(args: ast.arguments) -> Any:
    if args.vararg or args.posonlyargs:
        raise ValueError("not a signature: *args and / have no schema")
    if args.kwarg:
        if args.args or args.kwonlyargs:
            raise ValueError("not a signature: ** beside other parameters")
        return _schema_of(args.kwarg.annotation) if args.kwarg.annotation else _ABSENT
    first: list[Any] = [None] * (len(args.args) - len(args.defaults))
    properties, required = {}, []
    defaults = [*first, *args.defaults, *args.kw_defaults]
    for arg, default in zip([*args.args, *args.kwonlyargs], defaults):
        schema = _schema_of(arg.annotation) if arg.annotation else {}
        if default is None:
            required.append(arg.arg)
        elif not (isinstance(default, ast.Constant) and default.value is ...):
            schema = {**schema, "default": _value_of(default)}
        properties[arg.arg] = schema
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _schema_of(node: ast.AST | None) -> Any:
    match node:
        case ast.Name("Any"):
            return {}
        case ast.Name("object"):
            return True
        case ast.Name("Never"):
            return False
        case ast.Name(name) if name in _NAMES:
            return {"type": _NAMES[name]}
        case ast.Constant(None):
            return {"type": "null"}
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([base, rest])):
            said = _value_of(rest)
            return {**_schema_of(base), **said} if isinstance(said, dict) else _refuse(node)
        case ast.Subscript(ast.Name("Union"), of):
            return {"type": [_schema_of(one)["type"] for one in _elements(of)]}
        case ast.Subscript(ast.Name("Literal"), of):
            values = [_value_of(one) for one in _elements(of)]
            kinds = {_type_of(value) for value in values}
            return {"type": kinds.pop(), "enum": values} if len(kinds) == 1 else {"enum": values}
        case ast.Subscript(ast.Name("list"), of):
            return {"type": "array", "items": _schema_of(of)}
        case ast.Subscript(ast.Name("dict"), ast.Tuple([_, of])):
            return {"type": "object", "additionalProperties": _schema_of(of)}
        case ast.Dict(keys, values):
            return _schema_of_fields([_value_of(key) for key in keys], values)
        case ast.BinOp(left, ast.BitOr(), right):
            before = _schema_of(left)
            joined = isinstance(left, ast.BinOp)
            return {"anyOf": [*(before["anyOf"] if joined else [before]), _schema_of(right)]}
    return _refuse(node)


def _schema_of_fields(names: list, types: Iterable[ast.AST]) -> dict:
    properties, required = {}, []
    for name, node in zip(names, types):
        match node:
            case ast.Subscript(ast.Name("NotRequired"), of):
                properties[name] = _schema_of(of)
            case _:
                properties[name] = _schema_of(node)
                required.append(name)
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _elements(node: ast.AST) -> Sequence[ast.AST]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _refuse(node: ast.AST | None) -> Any:
    raise ValueError(f"not a type of a signature: {ast.unparse(node) if node else 'nothing'}"[:120])
