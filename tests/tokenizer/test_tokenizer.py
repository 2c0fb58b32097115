"""The tokenizer: exact on every text, blind to what looks like a special token; conversations; training; the CLI."""

import gzip
import json
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from nanochat_jax.config import TokenizerConfig
from nanochat_jax.errors import UserError
from tokenizer import SPECIAL_TOKENS, StreamDecoder, load_tokenizer
from tokenizer.__main__ import main, read_documents
from tokenizer.chat import parse_completion, render, render_batch, render_prompt
from tokenizer.evaluate import evaluate, table
from tokenizer.tokenizer import MAX_PIECE_CHARS
from tokenizer.train import sample_documents, train_tokenizer

VOCAB = 1024
ODD = "\u2581\ue000\u2585\x00\x01\x7f \n\r\t\u00a0\u2028\u3000\ufeff\ufffd\u0301e日🙂\U0010ffff<|>_='09aA"


def texts() -> list[str]:
    """This project's sources, and sentences in a few scripts."""
    made = [f"Der {i}. Satz — it's «{i * 37}» or 日本語 and Ελληνικά?\r\n\n\n\tEnd of {i}.\n" for i in range(200)]
    return [p.read_text() for p in sorted(ROOT.glob("*/*.py"))] + made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a vocabulary, and the figures of its training."""
    folder = tmp_path_factory.mktemp("tok") / "new" / "folder"
    return folder, train_tokenizer(iter(texts()), folder, TokenizerConfig(vocab_size=VOCAB), log=lambda _: None)


@pytest.fixture(scope="module")
def tok(trained):
    return load_tokenizer(trained[0])


# ---------------------------------------------------------------------------------------------- text


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(st.text(), st.text(alphabet=ODD), st.lists(st.sampled_from([*ODD, *SPECIAL_TOKENS])).map("".join))
)
def test_lossless(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode())
    assert not {getattr(tok, name[2:-2]) for name in SPECIAL_TOKENS} & set(ids)
    stream = StreamDecoder(tok)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) + stream.flush() == text


@pytest.mark.parametrize("filler", ["x", " ", "\n", "é", "🙂", "\u2581", "word ", "  ab", "1", "\u2581 a"])
def test_lossless_across_stretches(tok, filler):
    text = filler * (3 * MAX_PIECE_CHARS // len(filler) + 7)
    assert tok.decode(tok.encode(text)) == text


def test_stretches_do_not_show(tok):
    """Where words end, cutting a long text changes none of its ids."""
    unit = "The tokenizer of a text, and the text of its ids. "
    copies = 3 * MAX_PIECE_CHARS // len(unit)
    first, second = tok.encode(unit), tok.encode(unit + unit)[len(tok.encode(unit[:-1])) :]
    whole = tok.encode(unit * copies)
    assert whole == (tok.encode(unit[:-1]) + second[: len(second) - 1] * copies)[: len(whole) - 1] + first[-1:]


@pytest.mark.parametrize("text", [*SPECIAL_TOKENS, "a<|bos|>b", "<unk>", "<s>", "<0x41>", "<|assistant_end|><|bos|>"])
def test_text_is_never_special(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(tok.token_bytes()[i] > 0 for i in ids)


def test_lone_surrogate(tok):
    for text in ("ab\ud800cd", "\udfff", "\ud83d \ude00"):
        with pytest.raises(UserError, match=r"lone surrogate U\+D[0-9A-F]{3} at character \d"):
            tok.encode(text)
    with pytest.raises(UserError, match="character 2"):
        tok.encode_batch(["fine", "ab\ud800"])


def test_batch_is_encode(tok):
    batch = ["", "one", "\u2581", "two words", "a\u2581\u2581b" * 3, "x" * (MAX_PIECE_CHARS + 1)]
    assert tok.encode_batch(batch) == [tok.encode(text) for text in batch]
    assert tok.encode_batch([]) == [] and tok.encode("") == [] and tok.decode([]) == ""


def test_single_tokens(tok):
    """Multiple choice compares the logits of letters, arithmetic and spelling want one token a digit and a letter."""
    assert all(len(tok.encode(c)) == 1 for c in map(chr, range(33, 127)))
    assert all(len(tok.encode(" " + c)) == 1 for c in string.ascii_letters)
    assert [tok.decode([i]) for i in tok.encode("20481 and 7")] == [*"20481", *_pieces(tok, " and"), " ", "7"]
    for letter in "ABCDE":
        question = tok.encode(f"- some choice={letter}\n- another=Z\n")
        assert tok.encode(letter)[0] in question


def test_letters_and_marks_stand_apart_where_asked(tmp_path):
    text = "I have it. You have it, they have it: 'have it'. \"What have I?\" "
    for apart in (False, True):
        cfg = TokenizerConfig(vocab_size=VOCAB, apart=apart)
        train_tokenizer([*texts(), *[text] * 200], tmp_path, cfg, log=lambda _: None)
        tok = load_tokenizer(tmp_path)
        pieces = [tok.decode([i]) for i in range(tok.vocab_size)]
        mixed = [p for p in pieces if any(c.isalpha() for c in p) and any(c in ".,:'?\"" for c in p)]
        assert bool(mixed) is not apart and tok.decode(tok.encode(text)) == text


def _pieces(tok, text):
    return [tok.decode([i]) for i in tok.encode(text)]


@given(before=st.text(alphabet="ab .,=\n\r"), after=st.text(alphabet="ab .,=\n\r"))
@settings(max_examples=100, deadline=None)
def test_a_cut_at_a_line_break_is_a_cut_between_tokens(tok, before, after):
    before, after = before + "\n", "x" + after
    assert tok.encode(before + after) == tok.encode(before) + tok.encode(after)


# ---------------------------------------------------------------------------------------------- ids


def test_stream_never_shows_part_of_a_character(tok):
    text = "naïve 日本語 🙂🙂 👩‍👩‍👧 e\u0301 \u2581 Ж"
    stream = StreamDecoder(tok)
    shown = [stream.push(i) for i in tok.encode(text)]
    assert not any("\ufffd" in s for s in shown)
    assert "".join(shown) == text and stream.flush() == ""
    cut = tok.encode(chr(0x1FAE8))[:-1]  # nobody has written it, so that it is bytes and no token
    assert "".join(stream.push(i) for i in cut) == "" and stream.flush() == "\ufffd" == tok.decode(cut)
    assert stream.push(tok.encode("A")[0]) == "A"  # flush has begun a new text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_any_ids_decode(tok, ids):
    """A model may produce any of them: bytes that are not UTF-8 are shown as U+FFFD, by the stream as by decode."""
    stream = StreamDecoder(tok)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tok.decode(ids)
    assert len(tok.decode_bytes(ids)) == tok.token_bytes()[ids].sum()


def test_ids_out_of_range(tok):
    for id in (-1, VOCAB):
        with pytest.raises(UserError, match=f"token id {id} is outside of this vocabulary of {VOCAB}"):
            tok.decode([id])


def test_specials(tok):
    ids = [getattr(tok, name[2:-2]) for name in SPECIAL_TOKENS]
    assert len(set(ids)) == len(ids) and ids[0] == tok.bos
    assert tok.token_bytes().dtype == np.int32 and tok.token_bytes().shape == (VOCAB,)
    assert tok.token_bytes()[ids].sum() == 0 and tok.decode(ids) == ""


# ---------------------------------------------------------------------------------------------- files


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path / "a" / "b")
    again = load_tokenizer(tmp_path / "a" / "b")
    assert again.hash == tok.hash and len(tok.hash) == 16 and again.vocab_size == VOCAB
    assert again.meta["stats"] == tok.meta["stats"] and again.meta["hash"] == tok.hash
    assert again.encode("Hello, 日本") == tok.encode("Hello, 日本")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["meta.json", "tokenizer.model"]


def test_damaged_files(tok, tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tok.model)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is damaged"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------- training


def test_training_figures(trained):
    folder, stats = trained
    documents = texts()
    assert stats["documents"] == len(documents)
    assert stats["chars"] == sum(len(text[: TokenizerConfig().max_doc_chars]) for text in documents)
    assert stats["seconds"] > 0 and 0 < stats["peak_memory_gb"] < 64
    assert json.loads((folder / "meta.json").read_text())["stats"] == stats


def test_training_is_deterministic(tmp_path):
    documents = texts()[::7]
    hashes, said = set(), []
    for name in "ab":
        cfg = TokenizerConfig(vocab_size=512, sample_chars=30_000)
        train_tokenizer(iter(documents), tmp_path / name, cfg, log=said.append)
        hashes.add(load_tokenizer(tmp_path / name).hash)
    assert len(hashes) == 1 and len(said) == 2
    assert "512 entries" in said[0] and "peak memory" in said[0] and "\n" not in said[0]


def test_sample_is_even():
    documents = [f"{i:04d}" + "x" * (i % 50) for i in range(2000)]
    sample = sample_documents(iter(documents), 10_000, 1000)
    assert 9_900 < sum(map(len, sample)) <= 10_000
    assert sample == sorted(sample) == sample_documents(documents, 10_000, 1000)
    places = np.array([int(text[:4]) for text in sample])
    assert 800 < places.mean() < 1200 and places.min() < 100 and places.max() > 1900
    assert sample_documents(documents, 10**9, 1000) == documents
    assert sample_documents(["a" * 50, "b" * 50], 80, 20) == ["a" * 20, "b" * 20]
    assert sample_documents([], 80, 20) == []


def test_sample_does_not_read_for_ever():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "x" * 100

    assert sum(map(len, sample_documents(endless(), 1000, 100))) == 1000
    assert read <= 1000


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [
        (["hello world"] * 10, 4096, "set tokenizer.vocab_size .--vocab-size. to [34][0-9]{2} or less"),
        (["hello world"] * 10, 300, "set tokenizer.vocab_size .--vocab-size. to 512 or more"),
        (
            ["".join(map(chr, range(0x4E00, 0x5800)))] * 3,
            512,
            "characters of the text do not fit.*vocab_size .--vocab-size. to [0-9]{4} or",
        ),
        ([], 512, "no documents"),
        (["", ""], 512, "no documents"),
    ],
)
def test_impossible_training(tmp_path, documents, size, message):
    with pytest.raises(UserError, match=message) as e:
        train_tokenizer(documents, tmp_path, TokenizerConfig(vocab_size=size), log=lambda _: None)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_training_text_of_any_kind(tmp_path):
    """What SentencePiece would skip or choke on: reserved characters, surrogates, NUL, and a very long line."""
    odd = ["\u2585 \u2581 \ue000 \x00 \ud800 trained anyway, " * 400, "x y" * 500_000, "\n" * 3000, " " * 3000]
    cfg = TokenizerConfig(vocab_size=444, max_doc_chars=2_000_000)
    train_tokenizer(odd, tmp_path, cfg, log=lambda _: None)
    assert len(load_tokenizer(tmp_path).encode(" trained")) == 1


# ---------------------------------------------------------------------------------------------- conversations

CALL = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "2+2"},
    {"type": "python_output", "text": "4"},
    {"type": "text", "text": "It is 4."},
]
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": CALL},
    {"role": "user", "content": "<|assistant_start|>Thanks"},
    {"role": "assistant", "content": "Welcome"},
]


def test_render(tok):
    ids, mask = render(tok, {"messages": CHAT})
    e = tok.encode
    want = [
        ([tok.bos], 0),
        ([tok.user_start, *e("What is 2+2?"), tok.user_end, tok.assistant_start], 0),
        (e("Let me see. "), 1),
        ([tok.python_start, *e("2+2"), tok.python_end], 1),
        ([tok.output_start, *e("4"), tok.output_end], 0),
        ([*e("It is 4."), tok.assistant_end], 1),
        ([tok.user_start, *e("<|assistant_start|>Thanks"), tok.user_end, tok.assistant_start], 0),
        ([*e("Welcome"), tok.assistant_end], 1),
    ]
    assert ids == [i for part, _ in want for i in part]
    assert mask == [target for part, target in want for _ in part]
    others = [{"messages": CHAT[:2]}, {"messages": CHAT}, {"messages": CHAT[:2]}]
    assert render_batch(tok, others, threads=2) == [render(tok, conversation) for conversation in others]


def test_system_message_is_folded(tok):
    folded = [{"role": "user", "content": "Be brief.\n\nWhat is 2+2?"}, *CHAT[1:]]
    assert render(tok, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}) == render(
        tok, {"messages": folded}
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([CHAT[1]], "message 0 is from 'assistant'"),
        ([CHAT[0], CHAT[2]], "message 1 is from 'user'"),
        ([{"role": "system", "content": "s"}, CHAT[1]], "message 1 is from 'assistant'"),
        ([CHAT[0], {"role": "system", "content": "s"}], "message 1 is a system message"),
        ([{"role": "system", "content": "s"}], "no user message"),
        ([CHAT[0], {"role": "tool", "content": "s"}], "message 1 is from 'tool'"),
        ([{"role": "user"}], "message 0 needs"),
        ([{"role": "user", "content": 3}], "message 0: content must be"),
        ([{"role": "user", "content": CALL}], "message 0: a user message"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "message 1: a part needs"),
        ([], "not empty"),
        ("hello", "not empty"),
    ],
)
def test_malformed_conversations(tok, messages, message):
    with pytest.raises(UserError, match=message):
        render(tok, {"messages": messages})


def test_not_a_conversation(tok):
    with pytest.raises(UserError, match="messages"):
        render(tok, CHAT)


def test_render_prompt(tok):
    prompt = render_prompt(tok, CHAT[:3])
    ids, _ = render(tok, {"messages": CHAT})
    assert prompt == ids[: len(prompt)] and prompt[-1] == tok.assistant_start
    assert ids[len(prompt) :] == [*tok.encode("Welcome"), tok.assistant_end]
    assert render_prompt(tok, CHAT) == ids[:-1]  # what the assistant has said is gone on with


def test_parse_completion(tok):
    prompt = render_prompt(tok, CHAT[:1])
    ids, _ = render(tok, {"messages": CHAT[:2]})
    assert parse_completion(tok, ids[len(prompt) :]) == ("Let me see. It is 4.", CALL)
    assert parse_completion(tok, ids[len(prompt) : -1]) == ("Let me see. It is 4.", CALL)  # cut off
    assert parse_completion(tok, []) == ("", [])
    cut = [*tok.encode("a"), tok.python_start, *tok.encode("1+")]
    assert parse_completion(tok, cut) == ("a", [{"type": "text", "text": "a"}, {"type": "python", "text": "1+"}])


@settings(max_examples=100, deadline=None)
@given(choices=st.lists(st.integers(0, VOCAB - 1) | st.integers(0, 12), max_size=30))
def test_parse_completion_takes_anything(tok, choices):
    text, parts = parse_completion(tok, choices)
    assert text == "".join(p["text"] for p in parts if p["type"] == "text")


# ---------------------------------------------------------------------------------------------- evaluation, CLI


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_evaluate_alone(tok, no_network, monkeypatch, tmp_path):
    sample = ["Hello, world. " * 5, "日本語", "\u2581"]
    want = sum(len(t.encode()) for t in sample) / sum(len(tok.encode(t)) for t in sample)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert evaluate(tok, sample) == {"ours": want}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert evaluate(tok, sample) == {"ours": want}
    damaged = tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # cl100k_base: tiktoken would fetch it anew
    damaged.write_bytes(b"half a file")
    assert evaluate(tok, sample) == {"ours": want} and damaged.exists()
    assert evaluate(tok, []) == {"ours": 0.0}


def test_table():
    lines = table({"ours": 4.4, "gpt2": 4.0}).splitlines()
    assert lines[1].split() == ["ours", "4.400"] and lines[2].split() == ["gpt2", "4.000", "+10.0%"]


def test_command_line(tmp_path, capsys, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = texts()[::5]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows[:-3]}), data / "a.parquet")
    (data / "b.txt").write_bytes(rows[-1].encode() + b"\xff")
    train = ["train", "--data", str(data), "--out", str(out), "--vocab-size", "512", "--sample-chars", "100000"]
    assert main(train) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["vocab_size"] == 512 and result["hash"] == load_tokenizer(out).hash and result["chars"] <= 100_000
    assert main(["evaluate", "--dir", str(out), "--data", str(data / "b.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("ours") and json.loads(lines[-1])["bytes_per_token"]["ours"] > 1
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "nowhere", tmp_path / "empty"):
        assert main(["evaluate", "--dir", str(out), "--data", str(data)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert main(["evaluate", "--dir", str(tmp_path), "--data", str(data)]) == 2


def test_the_command_reads_json_and_what_is_compressed(tmp_path):
    said = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(9)
    ]
    wanted = [f"{i}\nyes" for i in range(9)]
    lines = "\n".join(map(json.dumps, said)).encode()
    documents = "\n".join(json.dumps({"id": 1, "text": text}) for text in wanted).encode()
    (tmp_path / "deep").mkdir()
    for name, content in (
        ("a.jsonl", lines),
        ("deep/a.jsonl.gz", gzip.compress(lines)),
        ("a.json", json.dumps(said).encode()),
        ("b.jsonl", documents),
        ("b.jsonl.gz", gzip.compress(documents)),
        ("b.txt", "<|endoftext|>".join(wanted).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(read_documents(tmp_path / name)) == wanted
    (tmp_path / "c.csv").touch()
    log = []
    assert list(read_documents(tmp_path, log.append)) == wanted * 6
    assert "c.csv not read" in log[0] and "27 conversations taken; 0 left out" in log[1]


def test_the_command_says_what_it_cannot_read(tmp_path, capsys):
    out = ["--out", str(tmp_path / "o"), "--vocab-size", "400"]
    for name, content in (("a.bz2", b"BZh"), ("a.jsonl", b'{"x": 1}'), ("a.jsonl", b""), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert main(["train", "--data", str(tmp_path / name), *out]) == 2
        said = capsys.readouterr()
        assert name in said.err and said.err.count("\n") == 1
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(texts())}))
    assert main(["train", "--data", str(tmp_path / "a.jsonl"), *out]) == 0
    assert "of 1 longer documents the first 10,000 characters alone" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("\n".join(texts()))
    assert main(["train", "--data", str(tmp_path / "a.txt"), *out]) == 0
    chars = json.loads(capsys.readouterr().out.splitlines()[-1])["chars"]
    assert chars > 0.99 * len("\n".join(texts())) > 10_000
