"""Conversations in the forms that people have them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from data_fakes import Bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.chats import Tally, Unusable, chat_files, conversation_of
from nanochat_jax.data.__main__ import main
from nanochat_jax.data.check import check
from nanochat_jax.errors import UserError
from tokenizer.chat import render

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROW = {"messages": HI}
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}
CALLED = {"type": "python", "text": 'weather(city="Oslo", days=2)'}


def messages(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def text(kind="text", said="hi"):
    return {"type": kind, "text": said}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SAID = 'def weather(city: str, days: int = 1): "Of a city."'
LOOSE = {"name": "weather", "description": "Of a city.", "parameters": {"city": {"type": "str"}}}
LOOSE["parameters"]["days"] = {"type": "int, optional", "default": 1}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
ANSWERED = [CALLED, {"type": "python_output", "text": "rain"}, {"type": "text", "text": "Rain."}]
TWO = ({"id": "a", "function": {"name": "f", "arguments": "{}"}}, {"id": "b", "function": {"name": "g"}})

FORMS = {
    "ShareGPT with calls in brackets": (
        {
            "system": f"You may call these: {json.dumps([{**LOOSE, 'name': 'the weather'}])}. Be kind.",
            "conversations": [
                {"from": "user", "value": "hi"},
                {"from": "assistant", "value": '[the weather(city="Oslo", days=2)]'},
                {"from": "tool", "value": "rain"},
                {"from": "assistant", "value": "Rain."},
            ],
        },
        [
            {
                "role": "system",
                "content": f"{SAID.replace('weather', 'the_weather')}\n\nYou may call these: . Be kind.",
            },
            HI[0],
            {"role": "assistant", "content": [{**CALLED, "text": f"the_{CALLED['text']}"}, *ANSWERED[1:]]},
        ],
    ),
    "query and calls": (
        {"query": "hi", "answers": f'[{{"name": "weather", "arguments": {ARGUMENTS}}}]', "tools": json.dumps([LOOSE])},
        [{"role": "system", "content": SAID}, HI[0], {"role": "assistant", "content": [CALLED]}],
    ),
    "speakers in one text": (
        {
            "system": "",
            "chat": f'USER: hi\n\n\nASSISTANT: <functioncall> {{"name": "weather", "arguments": \'{ARGUMENTS}\'}} '
            "<|endoftext|>\n\n\nFUNCTION RESPONSE: rain\n\n\nASSISTANT: Rain. <|endoftext|>\n\n\n",
        },
        [HI[0], {"role": "assistant", "content": ANSWERED}],
    ),
    "ShareGPT with calls in its text": (
        {
            "conversations": [
                {"from": "system", "value": f"Be kind. <tools> {json.dumps(WEATHER)} </tools>"},
                {"from": "human", "value": "hi"},
                {
                    "from": "gpt",
                    "value": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
                },
                {"from": "tool", "value": "<tool_response>\nrain\n</tool_response>"},
                {"from": "gpt", "value": "Rain."},
            ]
        },
        [{"role": "system", "content": f"{SAID}\n\nBe kind."}, HI[0], {"role": "assistant", "content": ANSWERED}],
    ),
    "messages with tool calls, whose results come in another order": (
        {
            "messages": [
                HI[0],
                {"role": "assistant", "content": "", "tool_calls": list(TWO)},
                {"role": "tool", "tool_call_id": "b", "content": "2"},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
                {"role": "assistant", "content": "yes"},
            ]
        },
        [
            HI[0],
            {
                "role": "assistant",
                "content": [
                    {"type": "python", "text": "f()"},
                    {"type": "python_output", "text": "1"},
                    {"type": "python", "text": "g()"},
                    {"type": "python_output", "text": "2"},
                    {"type": "text", "text": "yes"},
                ],
            },
        ],
    ),
    "messages with thoughts": (
        {"messages": [HI[0], {"role": "assistant", "content": "yes", "reasoning_content": "He says hi."}]},
        [
            {"role": "system", "content": "Think first."},
            HI[0],
            {"role": "assistant", "content": [text("think", "He says hi."), text("text", "yes")]},
        ],
    ),
    "messages with thoughts in their text": (
        {"messages": [HI[0], {"role": "assistant", "content": "<think>\nHe says hi.\n</think>\n\nyes"}]},
        [
            {"role": "system", "content": "Think first."},
            HI[0],
            {"role": "assistant", "content": [text("think", "He says hi."), text("text", "yes")]},
        ],
    ),
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
            "tools": [WEATHER],
        },
        [
            {"role": "system", "content": SAID},
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


KEYS = "role from content value type text tool_calls function_call function name arguments weight messages"
KEYS += " conversations prompt completion instruction input output history system tools"
WORDS = st.sampled_from(
    [*KEYS.split(), "user", "assistant", "human", "python", "python_output", "{}", "\ud83d", "\udce9"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS | st.just(""),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=5),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"])},
    optional={"content": WORDS | JSON, "tool_calls": st.just([CALL]) | JSON},
)


@settings(max_examples=300, deadline=None, database=None)
@given(JSON | st.builds(lambda said: {"messages": said}, st.lists(MESSAGE, max_size=6)))
def test_whatever_is_given_becomes_a_conversation_or_a_reason(row):
    try:
        got, form, _ = conversation_of(row)
    except Unusable as e:
        assert 0 < len(str(e)) < 200 and "\n" not in str(e)
        return
    assert (
        form and sum(render(Bytes(), {"messages": got})[1]) and conversation_of({"messages": got})[::2] == (got, set())
    )


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


# ------------------------------------------------------------------------------------------------- data check


def test_the_check_says_what_a_folder_holds(tmp_path, capsys):
    chat = tmp_path / "chat"
    chat.mkdir()
    rows = [
        ROW,
        ROW,
        {"messages": messages("q" * 100, "yes")},
        {"messages": messages("q", "a" * 100)},
        {"messages": []},
    ]
    (chat / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (chat / "b.csv").touch()
    for path in (tmp_path, chat):
        others, counted, lengths, long, duplicates, targets = check(path, Bytes(), 32)
        assert others.startswith("b.csv not read") and counted.startswith(
            "4 conversations taken; 1 left out (1 no messa"
        )
        assert lengths == "lengths: half have at most 10 tokens, 99 % at most 106, the longest 108"
        assert long.startswith("2 are longer than the context of 32 tokens") and "1 have no target within it" in long
        assert duplicates == "duplicates: 1 conversations occur before"
        assert targets == "targets: 48.3 % of 234 tokens"
    assert main(["check", str(chat / "a.jsonl"), "--context", "20"]) == 0
    said = capsys.readouterr().out
    assert "half have at most 5 characters" in said and "2 are longer than the context of 20 tokens, about 80" in said
    assert "targets: 50.9 % of 214 characters" in said


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none", None, "there is no file or folder"),
        ("a.csv", b"", "no file of conversations"),
        ("a.jsonl", b"{}", "can be used: 1 left out .1 no known form .fields none., first a.jsonl line 1"),
        ("a.jsonl", b"", "can be used: 0 left out"),
    ],
)
def test_the_check_refuses_what_holds_no_conversation(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=why):
        list(check(tmp_path / name, None, 32))
