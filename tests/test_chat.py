"""Dialogue: fitting the context, showing pieces; and chatting in the terminal."""

import io
import itertools

import pytest
from evals_fakes import tiny_model
from rich.console import Console
from test_server import TOK, Scripted

from nanochat_jax import chat, dialogue
from nanochat_jax.engine import Engine, Request


def talk(*lengths, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": chr(97 + i) * n} for i, n in enumerate(lengths)]
    return ([{"role": "system", "content": system}] if system else []) + turns


@pytest.mark.parametrize("limit", [5, 6, 20, 40, 500])
def test_fit_never_passes_the_limit_and_ends_with_the_question(limit):
    for lengths in itertools.product((1, 30), (1, 30), (0, 1, 100)):
        for system in (None, "be kind"):
            ids = dialogue.fit(TOK, talk(*lengths, system=system), limit)
            assert len(ids) <= limit and ids[0] == TOK.bos and ids[1] == TOK.user_start
            assert ids[-2:] == [TOK.user_end, TOK.assistant_start]


def test_fit_drops_the_oldest_and_keeps_the_system_message_and_the_end():
    whole = dialogue.fit(TOK, talk(5, 5, 5, 5, 5, system="S"), 500)
    assert bytes(i for i in whole if i < 256) == b"S\n\naaaaabbbbbcccccdddddeeeee"
    shorter = dialogue.fit(TOK, talk(5, 5, 5, 5, 5, system="S"), len(whole) - 1)
    assert bytes(i for i in shorter if i < 256) == b"S\n\ncccccdddddeeeee"
    one = dialogue.fit(TOK, [{"role": "user", "content": "0123456789"}], 4 + 3)
    assert bytes(i for i in one if i < 256) == b"789"


def test_pieces_join_what_is_of_one_kind_and_wait_for_whole_characters():
    pieces = dialogue.Pieces(TOK)
    snow = "雪".encode()
    assert pieces.push([*b"a", snow[0]]) == [("text", "a")]
    assert pieces.push([*snow[1:], TOK.python_start, *b"1+1"]) == [("text", "雪"), ("python", "1+1")]
    assert pieces.push([TOK.python_end, TOK.output_start, *b"2", TOK.output_end, *b"!", snow[0]]) == [
        ("python_output", "2"),
        ("text", "!"),
    ]
    assert pieces.flush() == [("text", "\ufffd")]


def arguments(**changes):
    args = chat.parse(["--run-dir", "x", "--seed", "1"])
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_ask_prints_what_is_visible_and_remembers(capsys):
    engine = Scripted([*b"It is ", TOK.python_start, *b"1+2", TOK.python_end, TOK.output_start, *b"3"])
    engine.script += [TOK.output_end, *"3 – drei".encode()]
    talk_ = chat.Chat(engine, TOK, arguments())
    out = Console(file=io.StringIO())
    assert talk_.ask("1+2?", out) == "It is 3 – drei" and out.file.getvalue() == "It is 3 – drei\n"
    assert [m["content"] for m in talk_.messages] == ["1+2?", "It is 3 – drei"]
    talk_.ask("again", out)
    assert engine.seen[1].seed == 2 and len(engine.seen[1].ids) > len(engine.seen[0].ids) + 10


def test_ctrl_c_stops_the_answer_alone(monkeypatch):
    engine = Scripted([*b"abcdefghi"] * 5)
    talk_, out = chat.Chat(engine, TOK, arguments()), Console(file=io.StringIO())
    steps, step = itertools.count(), engine.step

    def interrupted():
        if next(steps) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    assert talk_.ask("go", out) == "abcdef" and "[stopped]" in out.file.getvalue()
    assert not engine.busy


def test_loop_commands(monkeypatch):
    engine, out = Scripted([*b"yes"]), Console(file=io.StringIO())
    lines = iter(["hello", "", "/what", "/clear", "bye", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk_ = chat.Chat(engine, TOK, arguments())
    chat.loop(talk_, "demo", out)
    assert [m["content"] for m in talk_.messages] == ["bye", "yes"]
    assert "unknown command" in out.file.getvalue()


def test_answer_with_the_engine_equals_generate():
    engine = Engine(tiny_model(), slots=2, max_len=192)
    request = Request([1, 2, 3], 20, temperature=0.0)
    ids = engine.generate([request])[0].ids
    text = "".join(t for kind, t in dialogue.answer(engine, TOK, request))
    assert text == "".join(t for _, t in (lambda p: p.push(ids) + p.flush())(dialogue.Pieces(TOK)))


def test_errors_are_one_line(tmp_path, capsys):
    assert chat.main(["--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        chat.parse(["--run-dir", "x", "--top-p", "0"])
