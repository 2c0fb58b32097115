"""Folders of data put together at random of good and broken pieces: no traceback, no row that is not in the files now,
and none left out that is not counted.

`FUZZ=2000 pytest -m slow tests/data/test_fuzz_data.py` tries so many of each.
"""

import gzip
import io
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from data_fakes import Bytes
from hypothesis import given
from hypothesis import strategies as st

from conftest import fuzzed
from evals.tasks import load_task
from nanochat_jax.config import BaseConfig, DataConfig, FinetuneConfig, ModelConfig, RunConfig
from nanochat_jax.data.check import check
from nanochat_jax.data.documents import HELD
from nanochat_jax.data.packing import pack_split
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError
from nanochat_jax.stages.finetune import _dataset

MARK = re.compile(rb"m\d{6}")  # each conversation and document begins with its own


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


USABLE = {  # what a row with a mark may be
    "ours": lambda m: {"messages": [turn("user", m), turn("assistant", "yes")]},
    "list": lambda m: [turn("user", m), turn("assistant", "yes")],
    "system": lambda m: {"messages": [turn("developer", m), turn("user", "?"), turn("assistant", "yes")], "id": 7},
    "parts": lambda m: {
        "messages": [turn("user", [{"type": "text", "text": m}]), turn("assistant", ["yes", "no"]), turn("user", "cut")]
    },
    "joined": lambda m: {"messages": [turn("user", m), turn("user", "\u00e9?"), turn("assistant", "yes \U0001f642")]},
    "half": lambda m: {"messages": [turn("user", m + " \ud83d"), turn("assistant", "yes")]},
    "sharegpt": lambda m: {"conversations": [{"from": "human", "value": m}, {"from": "gpt", "value": "yes"}]},
    "alpaca": lambda m: {"instruction": m, "input": "", "output": "yes"},
    "pair": lambda m: {"prompt": m, "completion": "yes", "score": 0.5},
    "calls": lambda m: {
        "messages": [
            turn("user", m),
            turn("assistant", None, tool_calls=[call("f", '{"a": 1}')]),
            turn("tool", "4"),
            turn("assistant", "4"),
        ],
        "tools": [{}],
    },
    "long": lambda m: {"messages": [turn("user", m), turn("assistant", "yes " * 90)]},
    "a long question": lambda m: {"messages": [turn("user", m + " why" * 90), turn("assistant", "yes")]},
}
UNUSABLE = [
    {},
    [],
    7,
    "text",
    None,
    {"text": "a"},
    {"messages": []},
    {"messages": None},
    {"messages": [turn("user", "?")]},
    {"messages": [turn("user", "?"), turn("assistant", "")]},
    {"messages": [turn("assistant", "!")]},
    {"messages": [turn("user", "?"), turn("butler", "!")]},
    {"messages": [turn("user", {"text": "?"}), turn("assistant", "!")]},
    {"messages": [turn("user", "?"), turn("assistant", None, tool_calls=[call("f", "{")])]},
    {"instruction": None, "output": "yes"},
]
BROKEN = [
    b'{"messages": [{"role"',
    b'{"messages": nul}',
    b'{"prompt": "\xff", "completion": "a"}',
    b"}",
    b"no",
    b"{" * 9,
]


@st.composite
def chat_files(draw):
    """A file's name, its rows as (kind, row or bytes), and how to write them with marks from a number on."""
    parquet = draw(st.integers(0, 5)) == 0
    if parquet:
        kinds = [draw(st.sampled_from(["ours", "joined", "sharegpt", "alpaca", "pair"]))] * draw(st.integers(1, 6))
        return ".parquet", kinds, ()
    array = draw(st.booleans())
    pieces = st.sampled_from([*USABLE]) | st.sampled_from([*USABLE]) | st.integers(0, len(UNUSABLE) - 1)
    rows = draw(st.lists(pieces if array else pieces | st.sampled_from(BROKEN), min_size=1, max_size=8))
    end = draw(st.sampled_from(["", ".gz", ".zst"]))
    how = draw(st.sets(st.sampled_from(["bom", "crlf", "blank", "open", "members", "pretty", "utf-16"])))
    if any(isinstance(row, bytes) for row in rows):
        how -= {"utf-16"}
    return f"{draw(st.sampled_from(['.json', '.jsonl']))}{end}", rows, ("array", *how) if array else tuple(how)


def written(file, first):
    """(bytes, marks, number left out) of a file of `chat_files`."""
    suffix, kinds, how = file
    marks = [f"m{first + i:06d}" for i in range(len(kinds))]
    rows = [
        USABLE[k](m) if isinstance(k, str) else UNUSABLE[k] if isinstance(k, int) else k for k, m in zip(kinds, marks)
    ]
    used = {m for k, m in zip(kinds, marks) if isinstance(k, str)}
    if suffix == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue(), used, 0
    end = b"\r\n" if "crlf" in how else b"\n"
    if "array" in how:
        content = json.dumps(rows, indent=2 if "pretty" in how else None).encode().replace(b"\n", end)
        lines = [content]
    else:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        lines = [line for row in lines for line in ((b"  ", row) if "blank" in how else (row,))]
    content = end.join(lines) + (b"" if "open" in how else end)
    if "utf-16" in how:
        content = content.decode().encode("utf-16")
    elif "bom" in how:
        content = b"\xef\xbb\xbf" + content
    members = [content[:9], content[9:]] if "members" in how else [content]
    if suffix.endswith(".gz"):
        content = b"".join(gzip.compress(m, mtime=0) for m in members)
    elif suffix.endswith(".zst"):
        content = b"".join(pyarrow.compress(m, codec="zstd", asbytes=True) for m in members)
    return content, used, len(rows) - len(used)


class Folder:
    """A data folder with a cache, and what sft makes of it."""

    def __init__(self, folder):
        self.data, self.cache, self.said = Path(folder) / "M", Path(folder) / "cache", []
        (self.data / "chat").mkdir(parents=True)

    def write(self, files, first):
        """(marks, number left out)"""
        marks, left = set(), 0
        for i, file in enumerate(files):
            content, used, lost = written(file, first + 100 * i)
            (self.data / "chat" / f"f{i}{file[0]}").write_bytes(content)
            marks, left = marks | used, left + lost
        return marks, left

    def pack(self):
        """(marks in the rows, the manifest, conversations of both splits)"""
        self.said.clear()
        sft, data = FinetuneConfig(mixture={"chat": 1}), DataConfig(dir=str(self.data))
        config = RunConfig(model=ModelConfig(sequence_len=64), data=data, sft=sft)
        run = SimpleNamespace(
            config=config, cache_dir=self.cache, log=SimpleNamespace(say=self.said.append), tokenizer=Bytes()
        )
        rows = _dataset(run, "sft", sft)
        tokens = rows.rows(range(len(rows)))["tokens"].ravel()
        both = [len(load_task("chat", split=s, data=data, cache_dir=self.cache)) for s in ("train", "test")]
        return set(MARK.findall(bytes(i if i < 256 else 0 for i in tokens))), rows.manifest, both

    def counted(self, taken, left):
        """Whether the log says so, and `data check` does."""
        match = f"{taken:,} conversations taken(, |;).* {left:,} left out"
        assert any(re.search(match, line) for line in self.said), self.said
        assert any(re.search(match, line) for line in check(self.data, None, 64))


@pytest.mark.parametrize("examples", fuzzed(60))
def test_conversations(examples):
    @examples
    @given(st.lists(chat_files(), min_size=1, max_size=4), chat_files(), st.sets(st.sampled_from(["a.csv", ".b.json"])))
    def holds(files, changed, others):
        with tempfile.TemporaryDirectory() as tmp:
            folder = Folder(tmp)
            for name in others:
                (folder.data / "chat" / name).write_text("{")
            for first, now in ((0, files), (5000, files), (0, files[:-1] + [changed])):
                if now[-1] is changed:
                    (folder.data / "chat" / f"f{len(files) - 1}{files[-1][0]}").unlink()
                marks, left = folder.write(now, first)
                try:
                    found, manifest, (train, test) = folder.pack()
                except UserError as e:
                    why = str(e)
                    assert "\n" not in why
                    if not marks:
                        assert f"can be used: {left:,} left out" in why
                    else:  # all are for testing, or none fits
                        assert "is empty: its tasks have no rows" in why or "a question longer than" in why
                        folder.counted(len(marks), left)
                    continue
                assert {m.decode() for m in found} <= marks
                assert len(found) == manifest["conversations"] == train - manifest["dropped"]
                assert train + test == len(marks)
                folder.counted(len(marks), left)

    holds()


# ---------------------------------------------------------------------------------------------------- documents


@st.composite
def document_files(draw):
    kind = draw(st.sampled_from(["jsonl", "jsonl", "txt", "parquet"]))
    broken = draw(st.integers(0, 9)) == 0
    return (
        kind,
        draw(st.integers(0, 5)),
        broken,
        draw(st.sampled_from(["", ".gz", ".zst"]) if kind != "parquet" else st.just("")),
    )


def document_bytes(file, first):
    kind, n, broken, end = file
    texts = [f"m{first + i:06d} " + "word " * (i * 3) for i in range(n)]
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, "string")}), sink)
        content = sink.getvalue()[: -7 if broken else None]
    elif kind == "txt":
        content = "<|endoftext|>".join(texts).encode() + (b"\xff" if broken else b"")
    else:
        rows = [json.dumps({"text": t}) for t in texts] + (["{"] if broken else [])
        content = "\n".join(rows).encode()
    if end:
        content = gzip.compress(content) if end == ".gz" else pyarrow.compress(content, codec="zstd", asbytes=True)
    fails = broken and kind != "txt"
    return content, {t[:7] for t in texts}, fails


@pytest.mark.parametrize("examples", fuzzed(60))
def test_documents(examples):
    @examples
    @given(st.lists(document_files(), max_size=5), document_files())
    def holds(files, changed):
        with tempfile.TemporaryDirectory() as tmp:
            root, cache = Path(tmp) / "M", Path(tmp) / "cache"
            config = RunConfig(
                model=ModelConfig(sequence_len=16),
                data=DataConfig(dir=str(root), pack_workers=0, pack_buffer=3),
                base=BaseConfig(eval_tokens=None),
            )
            (root / "pretrain").mkdir(parents=True)
            for first, now in ((0, files), (5000, files), (9000, [changed, *files[1:]] if files else [])):
                for path in (root / "pretrain").iterdir():
                    path.unlink()
                made = []
                for i, file in enumerate(now):
                    content, marks, fails = document_bytes(file, first + 100 * i)
                    (root / "pretrain" / f"f{i}.{file[0]}{file[3]}").write_bytes(content)
                    made.append((marks, fails))
                if len(made) == 1:  # which has both splits
                    ((marks, fails),) = made
                    read = [({m for m in marks if (int(m[1:]) - first) % HELD}, fails)]
                else:
                    read = made[:-1]
                wanted = set().union(*(marks for marks, _ in read))
                try:
                    documents = open_documents(config.data, cache)
                    texts = list(documents.train())
                    assert not any(fails for _, fails in read)
                    assert {t[:7] for t in texts if t.startswith("m")} == wanted
                    with pack_split(config, documents, Bytes(), cache, "train", log=list) as rows:
                        tokens = rows.rows(range(len(rows)))["tokens"].ravel()
                except UserError as e:
                    why = str(e)
                    assert "\n" not in why
                    if not now:
                        assert "holds no files of documents" in why
                    elif any(fails for _, fails in read):
                        assert re.search(r"f\d\.\S+ cannot be read|f\d\.\S+, line \d+ is not JSON", why)
                    else:
                        assert "do not fill one row" in why
                    continue
                found = {m.decode() for m in MARK.findall(bytes(i if i < 256 else 0 for i in tokens))}
                assert found <= wanted

    holds()


# ------------------------------------------------------------------------------------------------------ tables

VALUES = [
    None,
    "",
    "What?",
    "#### 4",
    "4",
    "A",
    "B",
    0,
    3,
    9,
    -1,
    1.5,
    True,
    [],
    ["a", "b"],
    ["A", "B", "C", "D"],
    [1, 2],
]
VALUES += [{"text": ["a", "b"], "label": ["A", "B"]}, {"text": ["a"], "label": [None]}, {"text": None, "label": ["1"]}]
VALUES += ["def f():\n    return 1\n", "def check(candidate):\n    assert candidate() == 1", "f"]
COLUMNS = {
    "gsm8k": ["question", "answer"],
    "arc_easy": ["question", "choices", "answerKey"],
    "mmlu": ["question", "subject", "choices", "answer"],
    "humaneval": ["prompt", "canonical_solution", "test", "entry_point", "task_id"],
}
TABLES = {
    "gsm8k": "gsm8k_main_test.parquet",
    "arc_easy": "arc_ARC-Easy_test.parquet",
    "mmlu": "mmlu_all_test.parquet",
    "humaneval": "humaneval_test.parquet",
}


@st.composite
def tables(draw):
    task = draw(st.sampled_from([*COLUMNS]))
    columns = [c for c in COLUMNS[task] if draw(st.integers(0, 15))]
    n = draw(st.integers(0, 3))
    out = {}
    for column in columns:
        value = draw(st.sampled_from(VALUES))
        alike = [v for v in VALUES if v is None or type(v) is type(value)]
        out[column] = [draw(st.sampled_from(alike)) for _ in range(n)]
    return task, out


@pytest.mark.parametrize("examples", fuzzed(100))
def test_tables(examples):
    @examples
    @given(tables(), st.sampled_from(["", "4", "A", "#### 4", "```python\ndef f(): return 1\n```", "<<", "-"]))
    def holds(table, answer):
        task, columns = table
        with tempfile.TemporaryDirectory() as tmp:
            path = Path(tmp) / "tasks" / TABLES[task]
            path.parent.mkdir()
            try:
                pyarrow.parquet.write_table(pyarrow.table(columns), path)
            except (pyarrow.ArrowException, TypeError):
                return  # no table that parquet can hold
            try:
                found = load_task(task, split="test", data=DataConfig(dir=tmp), cache_dir=Path(tmp))
            except UserError as e:
                assert "\n" not in str(e) and ("lack" in str(e) or "cannot be read" in str(e))
                return
            for i in range(len(found)):
                try:
                    conversation = found[i]
                except UserError as e:
                    assert re.search(rf"{path.name}, row {i} \(from 0\) cannot be asked", str(e)) and "\n" not in str(e)
                    continue
                assert all(m["content"] for m in conversation["messages"])
                if task != "humaneval":  # which runs programs
                    assert found.evaluate(conversation, answer) in (True, False)

    holds()
