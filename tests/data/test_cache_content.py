"""What is in the cache is what would be made now: after any change of an input, the same as with an empty cache."""

import ast
import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from data_fakes import Bytes

from conftest import ROOT
from nanochat_jax.config import BaseConfig, DataConfig, FinetuneConfig, ModelConfig, RunConfig
from nanochat_jax.data import embedded, stories
from nanochat_jax.data.embedded import EmbeddedDocuments
from nanochat_jax.data.packing import pack_split
from nanochat_jax.data.sources import open_documents
from nanochat_jax.stages.finetune import _dataset

# Functions that write files, and the tests of what they write; a new one is to be added here with its own
WRITERS = {
    "data.embedded.files": "here",
    "data.packer._add": "here",
    "data.packed.write_packed": "here",
    "files.content_hashes": "here, and test_packed_conversations.py",
    "data.packed.write_arrays": "both packers'",
    "data.packed.write_shard": "both packers'",
    "data.packing.pack_conversations": "here",
    "data.hub._note": "test_hub.py: compared with the hub's SHA-256",
    "data.hub._download": "test_hub.py: compared with the hub's SHA-256",
    "data.hub.is_whole": "test_hub.py",
    "data.registry._listing": "test_hub.py: a list stays as it is until it is removed",
    "data.bundle._unpack": "test_core_bundle.py",
    "model.attention._measured": "test_attention.py",
}
WRITES = {"atomic_write_text", "atomic_write_bytes", "atomic_write_json", "write_arrays", "write_shard", "write_packed"}
WRITES |= {"whole_folder", "replace", "rename", "extractall", "write_text", "write_bytes", "savez", "save", "_note"}


def writers():
    """module.function of all that write, in the modules that a cache is given to."""
    package = ROOT / "nanochat_jax"
    for path in [*package.glob("data/*.py"), *package.glob("model/*.py"), *package.glob("kernels/*.py")]:
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        yield from (f"{module}.{name}" for name in functions_that_write(path))
    yield from (f"files.{n}" for n in functions_that_write(package / "files.py") if "atomic" not in n)


def functions_that_write(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            called = [c.func for c in ast.walk(node) if isinstance(c, ast.Call)]
            owners = {getattr(getattr(f, "value", None), "id", "") for f in called}
            names = {getattr(f, "attr", getattr(f, "id", "")) for f in called}
            if names & (WRITES - {"replace"}) or ("replace" in names and "os" in owners):
                yield node.name


def test_all_that_write_into_the_cache_are_known():
    assert set(writers()) - {"files.whole_folder"} == set(WRITERS)


class Tokens(Bytes):
    """Another tokenizer with the same ids."""

    def __init__(self, name="0"):
        super().__init__()
        self.hash = name * 16


class World:
    """A data folder and settings. `rows` and `chats` are what base and sft would learn from."""

    def __init__(self, folder):
        self.data, self.cache, self.tok = folder / "M", folder / "cache", Tokens()
        self.config = RunConfig(
            model=ModelConfig(sequence_len=32),
            data=DataConfig(dir=str(self.data), pack_workers=0, pack_buffer=4),
            base=BaseConfig(eval_tokens=None),
            sft=FinetuneConfig(mixture={"chat": 1, "gsm8k": 1, "spelling": -20}, max_rows=30),
        )
        for i in range(3):
            lines = [{"text": f"text {i} {j}" + "+" * (j % 17), "body": f"body {i} {j}"} for j in range(200)]
            self.write(f"pretrain/{i}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.write("pretrain/large.txt", b"large " * 100)
        chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "RED"}] for i in range(60)]
        self.write("chat/a.jsonl.gz", gzip.compress("".join(json.dumps(c) + "\n" for c in chats).encode(), mtime=0))
        self.table("red")
        self.write("words/a.txt.gz", gzip.compress("\n".join("q" + c * 4 for c in "abcdefghijklmnop").encode()))

    def write(self, name, content):
        """A file of the same times as before."""
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        path.write_bytes(content)
        if before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def change(self, name, old, new):
        """`old` and `new` are of one length."""
        content, zipped = (self.data / name).read_bytes(), name.endswith(".gz")
        content = (gzip.decompress(content) if zipped else content).replace(old, new)
        self.write(name, gzip.compress(content, mtime=0) if zipped else content)

    def table(self, answer):
        rows = [{"question": f"{i}?", "answer": f"{answer} #### 1"} for i in range(10)]
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        self.write("tasks/gsm8k_main_train.parquet", sink.getvalue().to_pybytes())

    def set(self, **changes):
        """section=dict(field=value)."""
        for section, fields in changes.items():
            value = replace(getattr(self.config, section), **fields) if isinstance(fields, dict) else fields
            self.config = replace(self.config, **{section: value})

    def rows(self, cache, split="train"):
        documents = open_documents(self.config.data, cache)
        with pack_split(self.config, documents, self.tok, cache, split, log=list) as rows:
            return rows.rows(range(len(rows)))["tokens"].tobytes()

    def chats(self, cache):
        log = SimpleNamespace(say=list)
        rows = _dataset(
            SimpleNamespace(config=self.config, cache_dir=cache, log=log, tokenizer=self.tok), "sft", self.config.sft
        )
        return b"".join(array.tobytes() for array in rows.rows(range(len(rows))).values())

    def check(self, change, makers):
        """`change` leads to what an empty cache leads to, and to something else than before."""
        before = [make(self.cache) for make in makers]
        assert before == [make(self.cache) for make in makers]
        change(self)
        empty = self.cache.with_name("empty")
        shutil.rmtree(empty, ignore_errors=True)
        now = [make(self.cache) for make in makers]
        assert now == [make(empty) for make in makers]
        assert all(a != b for a, b in zip(before, now))


DOCUMENTS = {
    "a word": lambda w: w.change("pretrain/0.jsonl", b"text 0 7", b"TEXT 0 7"),
    "a file more": lambda w: w.write("pretrain/00.txt", b"more " * 100),
    "a file less": lambda w: (w.data / "pretrain/1.jsonl").unlink(),
    "a file's name": lambda w: (w.data / "pretrain/1.jsonl").rename(w.data / "pretrain/9.jsonl"),
    "column": lambda w: w.set(data=dict(text_column="body")),
    "context": lambda w: w.set(model=dict(sequence_len=48)),
    "buffer": lambda w: w.set(data=dict(pack_buffer=400)),
    "tokens": lambda w: w.set(data=dict(max_train_tokens=320)),
}
CHATS = {
    "an answer": lambda w: w.change("chat/a.jsonl.gz", b"RED", b"TAN"),
    "a table": lambda w: w.table("tan"),
    "words": lambda w: w.change("words/a.txt.gz", b"qaaaa", b"qaaab"),
    "a file more": lambda w: w.write("chat/b.json", b'[{"prompt": "b", "completion": "b"}]'),
    "mixture": lambda w: w.set(sft=dict(mixture={"chat": 2, "gsm8k": 1, "spelling": -20})),
    "targets": lambda w: w.set(sft=dict(all_targets=True)),
    "rows": lambda w: w.set(sft=dict(max_rows=29)),
    "context": lambda w: w.set(model=dict(sequence_len=48)),
    "seed": lambda w: w.set(seed=7),
}


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS)
def test_rows_of_documents(tmp_path, change):
    (world := World(tmp_path)).check(change, [world.rows])


def test_rows_of_the_validation_file(tmp_path):
    world = World(tmp_path)
    world.check(lambda w: w.change("pretrain/large.txt", b"large", b"LARGE"), [lambda cache: world.rows(cache, "val")])


@pytest.mark.parametrize("change", CHATS.values(), ids=CHATS)
def test_rows_of_conversations(tmp_path, change):
    (world := World(tmp_path)).check(change, [world.chats])


def test_rows_of_another_tokenizer(tmp_path):
    """Its ids are the same here, so that what tells is the number of folders."""
    world = World(tmp_path)
    for name in "01":
        world.tok = Tokens(name)
        world.rows(world.cache), world.chats(world.cache)
    assert len(list(world.cache.glob("packed/*"))) == 4


def test_conversations_whose_rules_changed(tmp_path, monkeypatch):
    world, changed = World(tmp_path), tmp_path / "tasks"
    world.chats(world.cache)
    shutil.copytree(ROOT / "evals/tasks", changed)
    with open(changed / "phrases.yaml", "a") as file:
        file.write("# changed\n")
    monkeypatch.setattr("evals.tasks._MADE_OF", (changed,))
    world.chats(world.cache)
    assert len(list(world.cache.glob("packed/*"))) == 2


@pytest.mark.parametrize("change", ["package", "stories.yaml", "rules"])
def test_embedded_text(tmp_path, monkeypatch, change):
    said = '"""' + "What this says was there before. " * 10 + '"""'
    (tmp_path / "optax").mkdir()
    (tmp_path / "optax/__init__.py").write_text(said)
    shutil.copytree(stories.HERE, tmp_path / "data")
    monkeypatch.setattr(embedded, "MADE", 50)
    monkeypatch.setattr(embedded, "VALIDATION_SHARE", 2)
    monkeypatch.setattr(embedded, "_root", lambda package: tmp_path / package)
    monkeypatch.setattr(stories, "HERE", tmp_path / "data")
    monkeypatch.setattr(stories, "__file__", str(tmp_path / "data/stories.py"))

    def texts(cache):
        for remembered in (stories.words, stories.script, stories.names, stories.common_words):
            remembered.cache_clear()
        documents = EmbeddedDocuments(cache)
        return sorted([*documents.train(), *documents.val()])

    def edit(_):
        if change == "package":
            (tmp_path / "optax/__init__.py").write_text(said.replace("before", "after"))
        elif change == "rules":  # the code, which a test cannot change while it runs
            monkeypatch.setattr(embedded, "MADE", 40)
            (tmp_path / "data/stories.py").write_text("MADE = 40")
        else:
            path = tmp_path / "data/stories.yaml"
            path.write_text(path.read_text().replace("Once upon a time", "Long long ago"))

    try:
        World(tmp_path).check(edit, [texts])
    finally:
        monkeypatch.undo()
        for remembered in (stories.words, stories.script, stories.names, stories.common_words):
            remembered.cache_clear()


def test_the_cache_holds_nothing_else(tmp_path):
    world = World(tmp_path)
    world.rows(world.cache), world.chats(world.cache)
    assert {p.name for p in Path(world.cache).iterdir()} <= {"packed", "hashes.json"}
