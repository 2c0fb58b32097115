"""Conversations in the forms that people have them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from nanochat_jax.chats import Tally, Unusable, chat_files, conversation_of

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROW = {"messages": HI}
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}
CALLED = {"type": "python", "text": "weather(city='Oslo', days=2)"}


def messages(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def text(kind="text", said="hi"):
    return {"type": kind, "text": said}


FORMS = {
    "messages": (ROW, HI),
    "lists of messages": (HI, HI),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "Be kind."},
        [SYSTEM, *HI],
    ),
    "ShareGPT with no from but role": ({"conversations": HI}, HI),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
        messages("a", "b", "Add.\n\n1 2", "3"),
    ),
    "Alpaca without input": ({"instruction": "hi", "input": "", "output": "yes"}, HI),
    "Dolly": ({"instruction": "hi", "context": "", "response": "yes"}, HI),
    "prompt and completion": ({"prompt": "hi", "completion": "yes"}, HI),
    "prompt and completion as messages": ({"prompt": HI[:1], "completion": HI[1:]}, HI),
    "question and response": ({"system_prompt": "Be kind.", "question": "hi", "response": "yes"}, [SYSTEM, *HI]),
    "messages with tool calls": (
        {
            "messages": [
                HI[0],
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
                {"role": "assistant", "content": "Rain."},
            ],
            "tools": [{"type": "function"}],
        },
        [
            HI[0],
            {"role": "assistant", "content": [CALLED, text("python_output", "rain"), text("text", "Rain.")]},
        ],
    ),
    "messages with tool calls, which end with one": (
        {"messages": [HI[0], {"role": "assistant", "tool_calls": [CALL]}]},
        [HI[0], {"role": "assistant", "content": [CALLED]}],
    ),
    "ShareGPT with a call": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "Rain."},
            ]
        },
        [
            HI[0],
            {"role": "assistant", "content": [CALLED, text("python_output", "rain"), text("text", "Rain.")]},
        ],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read(name):
    row, want = FORMS[name]
    got, form, _ = conversation_of(row)
    assert got == want and name.startswith(form) or (form, got) == ("messages", want)
    assert conversation_of({"messages": got})[::2] == (want, set())  # what is ours stays as it is


@pytest.mark.parametrize(
    ("said", "want", "how"),
    [
        ([{"role": "user", "content": [text(), text("input_text", "!")]}, HI[1]], messages("hi!", "yes"), "content in"),
        ([{**SYSTEM, "role": "developer"}, *HI], [SYSTEM, *HI], "role developer as system"),
        ([*HI, HI[0]], HI, "last answer"),
        ([*HI, HI[0], {"role": "assistant", "content": ""}], HI, "last answer"),
        ([HI[0], *HI, HI[1]], messages("hi\n\nhi", "yes\n\nyes"), "one role joined"),
        ([SYSTEM, SYSTEM, *HI], [{"role": "system", "content": "Be kind.\n\nBe kind."}, *HI], "one role joined"),
        (messages("hi", "\ud83d yes"), messages("hi", "\ufffd yes"), "half characters"),
        ([{"role": "system", "content": ""}, *HI], HI, "empty system"),
    ],
)
def test_what_has_one_meaning_is_repaired(said, want, how):
    got, _, repairs = conversation_of({"messages": said})
    assert got == want and len(repairs) == 1 and how in repairs.pop()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [SYSTEM]}, "only a system message"),
        ({"messages": HI[:1]}, "no answer"),
        ({"messages": messages("hi", "")}, "an empty answer"),
        ({"messages": messages(None, "yes")}, "an empty question"),
        ({"messages": messages("hi", None)}, "an empty answer"),
        ({"messages": [HI[0], {"role": "tool", "content": "4"}, HI[1]]}, "a tool turn that follows no call"),
        ({"messages": [*HI, SYSTEM, *HI]}, "a system message between others"),
        ({"messages": HI[::-1] + HI[1:]}, "the assistant speaks first"),
        ({"messages": messages("hi", "yes", roles=("alice", "bob"))}, "unknown role 'alice'"),
        ({"messages": [{"content": "hi"}]}, "a message without a role"),
        ({"messages": ["hi"]}, "a message that is no object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HI[1]]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": 5}, HI[1]]}, "a content of type int"),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "weight 0"),
        ({"messages": [HI[0], {**HI[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments"),
        ({"messages": None}, "no known form (fields messages)"),
        ({"text": "hi"}, "no known form (fields text)"),
        ("hi", "holds str"),
        ({"prompt": None, "completion": "yes"}, "an empty question"),
    ],
)
def test_what_has_no_meaning_is_left_out_with_its_reason(row, why):
    with pytest.raises(Unusable) as e:
        conversation_of(row)
    assert why in str(e.value)


# ------------------------------------------------------------------------------------------------- files

LINES = json.dumps(ROW) + "\n" + json.dumps(HI) + "\n" + json.dumps({"prompt": "hi", "completion": "yes"}) + "\n"
ARRAY = [ROW, ROW, {"prompt": "hi", "completion": "yes"}]
ZIPPED = gzip.compress(json.dumps(ROW).encode())


def read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    tally = Tally()
    return list(tally.read([tmp_path / name], tmp_path)), tally


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", b"\n \n" + LINES.strip().encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("crlf.ndjson", LINES.replace("\n", "\r\n").encode()),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("members.jsonl.gz", ZIPPED + ZIPPED + gzip.compress(b"\xef\xbb\xbf" + json.dumps(HI).encode())),
        ("a.jsonl.zst", zstd(LINES.encode())),
        ("frames.jsonl.zst", zstd(LINES[:40].encode()) + zstd(LINES[40:].encode())),
        ("a.json", LINES.encode()),
        ("one_line.json", json.dumps(ARRAY).encode()),
        ("one_line.jsonl", json.dumps(ARRAY).encode()),
        ("pretty.json", json.dumps(ARRAY, indent=2).encode()),
        ("pretty_crlf.json", b"\xef\xbb\xbf" + json.dumps(ARRAY, indent=2).replace("\n", "\r\n").encode()),
        ("sequence.json", "\n".join(json.dumps(row, indent=2) for row in ARRAY).encode()),
        ("rows.json", ("[" + ",\n".join(map(json.dumps, ARRAY)) + "]\n").encode()),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_a_file_is_read(tmp_path, monkeypatch, name, content, block):
    if block == 7 and b"\n[" not in content and not content.startswith(b"["):
        pytest.skip("only an array is read in blocks")
    monkeypatch.setattr("nanochat_jax.chats.LINE", block)
    got, tally = read(tmp_path, name, content)
    assert got == [HI] * 3 and tally.taken == 3 and not tally.left_out


def test_a_long_first_line_is_no_array(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_jax.chats.LINE", 10)
    assert read(tmp_path, "a.jsonl", LINES.encode())[0] == [HI] * 3


def test_parquet_is_read_whatever_its_columns(tmp_path):
    for rows in ([ROW, ROW], [{"instruction": "hi", "input": None, "output": "yes", "other": 1}]):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert list(Tally().read([tmp_path / "a.parquet"], tmp_path)) == [HI] * len(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"other": 1}]), tmp_path / "a.parquet")
    assert not list((tally := Tally()).read([tmp_path / "a.parquet"], tmp_path))
    assert tally.left_out == {"no known form (fields other)": [1, "a.parquet row 1"]}


def test_damage_costs_its_line_and_is_named(tmp_path):
    lines = [json.dumps(ROW)] * 60 + [json.dumps(ROW)[:41]]
    got, tally = read(tmp_path, "a.jsonl", "\n".join(lines).encode())
    assert got == [HI] * 60 and tally.left_out == {"not JSON": [1, "a.jsonl line 61"]}
    got, tally = read(tmp_path, "b.jsonl", "\n".join(lines[::-1]).encode())
    assert got == [HI] * 60 and tally.left_out == {"not JSON": [1, "b.jsonl line 1"]}
    latin = LINES.replace("yes", "h\u00e9").encode("latin-1")
    got, tally = read(tmp_path, "c.jsonl", latin + LINES.encode())
    assert got == [HI] * 3 and tally.left_out == {"text that is not UTF-8": [3, "c.jsonl line 1"]}
    got, tally = read(tmp_path, "d.json", json.dumps(ARRAY, indent=1)[:-30].encode())
    assert got == [HI] * 2 and list(tally.left_out.values()) == [[1, "d.json entry 3"]]
    got, tally = read(tmp_path, "deep.jsonl", b"[" * 200_000 + b"\n" + LINES.encode())
    assert tally.left_out
    assert read(tmp_path, "empty.jsonl", b"")[0] == read(tmp_path, "blank.json", b" \n")[0] == []


def test_the_tally_says_what_was_made_of_rows(tmp_path):
    rows = [
        ROW,
        {"messages": [*HI, HI[0]]},
        {"messages": HI[:1]},
        {"messages": HI[:1]},
        {"prompt": "a", "completion": "b"},
    ]
    _, tally = read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert tally.lines() == [
        "a.jsonl: taken for prompt and completion",
        "3 conversations taken, 1 of them repaired (1 taken up to the last answer); "
        "2 left out (2 no answer, first a.jsonl line 3)",
    ]


def test_files_of_conversations_are_told_from_others(tmp_path):
    for name in ("a.jsonl", "b.JSON", "c.json.gz", "deep/d.parquet", "e.csv", "f.parquet.gz", ".g.jsonl", "h.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    chats, others = chat_files(tmp_path)
    assert [p.name for p in chats] == ["a.jsonl", "b.JSON", "c.json.gz", "d.parquet"]
    assert [p.name for p in others] == ["e.csv", "f.parquet.gz", "h.txt"]
