"""Dialogue: fitting the context, and ids as pieces of text."""

import itertools

import pytest
from server_fakes import TOK

from nanochat_jax.engine import dialogue
from nanochat_jax.engine.dialogue import fit
from tokenizer.chat import render_prompt


def talk(*lengths, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": chr(97 + i) * n} for i, n in enumerate(lengths)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def text(fitted):
    return TOK.decode(fitted.ids)


@pytest.mark.parametrize("limit", [5, 6, 9, 20, 21, 40, 60, 500])
def test_fit_never_passes_the_limit_and_ends_with_the_question(limit):
    for lengths in itertools.product((1, 30), (0, 30), (1, 15), (2,), (0, 1, 100)):
        for system in (None, "be kind"):
            fitted = fit(TOK, talk(*lengths, system=system), limit)
            ids, whole = fitted.ids, render_prompt(TOK, talk(*lengths, system=system))
            assert len(ids) <= limit and ids[:2] == [TOK.bos, TOK.user_start]
            assert ids[-2:] == [TOK.user_end, TOK.assistant_start]
            assert (ids == whole) == (fitted[1:] == (0, False))


def test_fit_keeps_the_system_message_the_first_exchange_and_the_newest():
    messages = talk(5, 5, 5, 5, 5, 5, 5, system="S")
    whole = fit(TOK, messages, 500)
    assert text(whole) == "S\n\naaaaabbbbbcccccdddddeeeeefffffggggg"
    shorter = fit(TOK, messages, len(whole.ids) - 1)
    assert text(shorter) == "S\n\naaaaabbbbbeeeeefffffggggg" and shorter[1:] == (2, False)
    assert shorter.ids == render_prompt(TOK, messages[:3] + messages[5:])
    least = fit(TOK, messages, len(shorter.ids) - 1)
    assert text(least) == "S\n\naaaaabbbbbggggg" and least[1:] == (4, False)


def test_fit_cuts_the_front_of_the_last_message():
    one = fit(TOK, [{"role": "user", "content": "0123456789"}], 4 + 3)
    assert text(one) == "789" and one[1:] == (0, True)
    parts = [{"type": "text", "text": "01234"}, {"type": "text", "text": "56789"}]
    assert fit(TOK, [{"role": "user", "content": parts}], 4 + 3) == one
    messages = [*talk(2, 2, 2, 2, system="S"), {"role": "user", "content": "0123456789"}]
    cut = fit(TOK, messages, 12 + 3 + 9)  # the system message and the first exchange, and what is around the last
    assert text(cut) == "S\n\naabb123456789" and cut[1:] == (2, True)


def test_fit_gives_up_a_first_exchange_that_fills_the_context():
    messages = [*talk(40, 40, 2, 2, system="S"), {"role": "user", "content": "0123456789" * 3}]
    fitted = fit(TOK, messages, 50)
    assert text(fitted) == "S\n\n" + "0123456789" * 3 and fitted[1:] == (4, False)
    cut = fit(TOK, messages, 20)
    assert text(cut) == "S\n\n" + ("0123456789" * 3)[-(20 - 4 - 3) :] and cut[1:] == (4, True)
    narrow = fit(TOK, [{"role": "system", "content": "x" * 99}, *messages[-1:]], 24)
    assert text(narrow) == "x" * 10 + "0123456789" and narrow[1:] == (0, True)


def test_fit_reads_each_message_once_or_twice(monkeypatch):
    read = []
    monkeypatch.setattr(TOK, "encode", lambda text: read.append(len(text)) or list(text.encode()), raising=False)
    fit(TOK, talk(*[10] * 401), 200)
    assert sum(read) < 2 * 4010 + 200  # not again for each exchange that is dropped


def test_pieces_join_what_is_of_one_kind_and_wait_for_whole_characters():
    reader = dialogue.Reader(TOK)

    def said(ids):
        return dialogue.joined(piece for id in ids for piece in reader.push(id))

    snow = "雪".encode()
    assert said([*b"a", snow[0]]) == [("text", "a")]
    assert said([*snow[1:], TOK.python_start, *b"1+1"]) == [("text", "雪"), ("python", "1+1")]
    last = [TOK.python_end, TOK.output_start, *b"2", TOK.output_end, *b"!", snow[0]]
    assert said(last) == [("python_output", "2"), ("text", "!")]
    assert dialogue.joined(reader.flush()) == [("text", "\ufffd")]


def test_reader_counts_calls_also_where_a_model_opens_and_closes_at_will():
    python, output = [TOK.python_start, *b"i", TOK.python_end], [TOK.output_start, *b"o", TOK.output_end]

    def calls(ids):
        reader = dialogue.Reader(TOK)
        return [(p.text, p.call) for id in ids for p in reader.push(id) if p.kind != "text" and p.text]

    assert calls(python + [*b"x"] + output + python + output) == [("i", 0), ("o", 0), ("i", 1), ("o", 1)]
    assert calls(python + python + output) == [("i", 0), ("i", 1), ("o", 1)]
    assert calls(output + output + python) == [("o", 0), ("o", 1), ("i", 2)]
