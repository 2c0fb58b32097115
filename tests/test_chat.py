"""Chatting in the terminal."""

import io
import itertools

import pytest
from evals_fakes import tiny_model
from rich.console import Console
from server_fakes import TOK, Scripted

from nanochat_jax import chat
from nanochat_jax.engine import dialogue
from nanochat_jax.engine.engine import Engine, Request


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
    question, reply = (m["content"] for m in talk_.messages)
    assert question == "1+2?" and [p["type"] for p in reply] == ["text", "python", "python_output", "text"]
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
    lines = iter(["hello", "", "/what", "/clear", "/system be brief", "/temperature 0.1", "/topk x", "/topp 2", "bye"])
    lines = itertools.chain(lines, ["/again", "/length 7", "/topp", "more", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk_ = chat.Chat(engine, TOK, arguments())
    chat.loop(talk_, "demo", out)
    assert [m["content"] for m in talk_.messages] == ["bye", "yes", "more", "yes"]
    hello, bye, again, more = engine.seen
    assert b"be brief" in TOK.decode_bytes(bye.ids) and bye.temperature == 0.1 and bye.top_k == arguments().top_k
    assert again.ids == bye.ids and again.seed != bye.seed
    assert more.max_new_tokens == 7 and more.ids[: len(bye.ids)] == bye.ids
    said = out.file.getvalue()
    assert "no command /what" in said and "/temperature" in said
    assert "/topk needs a whole number" in said and "/topp needs" in said and "topp is 1.0" in said
    assert next(lines) == "never"


def test_what_was_typed_is_remembered(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    readline.clear_history()
    with chat.line_history():
        readline.add_history("who are you")
    readline.clear_history()
    with chat.line_history():
        assert readline.get_history_item(1) == "who are you"
    readline.clear_history()


def test_nobody_knows_where_the_home_is(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", unknown)
    with chat.line_history():
        pass


def test_answer_with_the_engine_equals_generate():
    engine = Engine(tiny_model(), slots=2, max_len=192)
    request = Request([1, 2, 3], 20, temperature=0.0)
    ids = engine.generate([request])[0].ids
    text = "".join(t for kind, t in dialogue.answer(engine, TOK, request))
    reader = dialogue.Reader(TOK)
    assert text == "".join(p.text for p in [*(p for id in ids for p in reader.push(id)), *reader.flush()])


def test_errors_are_one_line(tmp_path, capsys):
    assert chat.main(["--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        chat.parse(["--run-dir", "x", "--top-p", "0"])
