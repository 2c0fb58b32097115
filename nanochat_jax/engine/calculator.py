"""The calculator that a model may call: arithmetic, and counting letters. A parser over the AST, never `eval`.

`use_calculator` takes what stands between <|python_start|> and <|python_end|> and gives the text for between
<|output_start|> and <|output_end|>, or None where there is nothing to say.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable

MAX_CHARS = 256  # of an expression
MAX_DIGITS = 100  # of any number on the way: nothing can be made to grow without end
_ARITHMETIC = frozenset("0123456789*+-/.() ")
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class _Refused(Exception):
    pass


def use_calculator(expression: str) -> str | None:
    """The value of an arithmetic expression, `'text'.count('x')` or `len('text')`, as Python prints it; else None.

    Commas in numbers are left out; powers are refused.
    """
    expression = expression.strip()
    if not expression or len(expression) > MAX_CHARS:
        return None
    try:
        number = expression.replace(",", "")
        with warnings.catch_warnings():  # Python's opinion on what a model wrote is nobody's concern
            warnings.simplefilter("ignore")
            tree = ast.parse(number if set(number) <= _ARITHMETIC else expression, mode="eval").body
        value = _count(tree) if isinstance(tree, ast.Call) else _value(tree)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, _Refused):
        return None
    return str(value)


def _value(node: ast.AST) -> int | float:
    """The number that an expression of numbers and + - * / // stands for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise _Refused


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS or not math.isfinite(value):
        raise _Refused
    return value


def _count(call: ast.Call) -> int:
    """'text'.count('x'), or len('text')."""
    match call:
        case ast.Call(ast.Name("len"), [ast.Constant(str(text))], []):
            return len(text)
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            return text.count(part)
    raise _Refused
