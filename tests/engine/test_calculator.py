"""The calculator against the reference, against mischief, and as a state machine."""

import json
import warnings

import pytest
from evals_fakes import ByteTokenizer

from conftest import golden_files
from nanochat_jax.engine.calculator import use_calculator
from nanochat_jax.engine.tools import Tools


def golden_expressions():
    return [
        pytest.param(expression, want, id=f"{path.stem}-{expression[:20]}")
        for path in golden_files("behaviour*.json")
        for expression, want in json.loads(path.read_text())["calculator"].items()
    ]


@pytest.mark.parametrize(("expression", "want"), golden_expressions())
def test_calculator_golden(expression, want):
    assert use_calculator(expression) == want


@pytest.mark.parametrize(
    "expression",
    [
        "2**99999",
        "(" * 100 + "1" + ")" * 100 + "+" * 60,
        "9" * 200,
        "*".join(["9" * 40] * 4),
        "1e308*10",
        "'a'.count('a', 0, 10**9)",
        "'a'*10**9",
        "x.count('a')",
        "''.join('a')",
        "lambda: 1",
        "[1][0]",
        "1 if 1 else 2",
        "True + 1",
        "1j*1j",
        "1;2",
    ],
)
def test_refuses(expression):
    assert use_calculator(expression) is None


def test_lengths():
    assert use_calculator("len('window')") == "6" and use_calculator("len('')") == "0"
    assert use_calculator("len(3)") is None and use_calculator("len('a', 'b')") is None
    assert use_calculator("max('a')") is None


def test_counts_with_commas_in_the_text():
    assert use_calculator("'a,b,c'.count(',')") == "2"


def test_tool_forces_the_result_and_forgets_the_call():
    tok = ByteTokenizer()
    state = Tools(tok).start()
    call = [*b"2*3", tok.python_start, *b"4*5"]
    assert all(state.push(i) == [] for i in call)
    assert state.push(tok.python_end) == [tok.output_start, *b"20", tok.output_end]
    assert state.push(tok.python_end) == []  # closes nothing
    assert [state.push(i) for i in [tok.python_start, *b"4*", tok.python_end]] == [[]] * 4  # no value, no output


def test_what_python_warns_of_is_no_warning_to_the_user():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert use_calculator("3and 4") is None and use_calculator("'\\d'.count('d')") == "1"
    assert not caught
