"""What mid and sft learn from is packed anew when it changes, and nothing that failed is kept."""

import functools
import gzip
import json
import os
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from data_fakes import Bytes

from nanochat_jax.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig
from nanochat_jax.errors import UserError
from nanochat_jax.files import content_hashes
from nanochat_jax.stages.finetune import _dataset


def chats(answer, n=60):
    said = lambda i: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]  # noqa: E731
    return "".join(json.dumps({"messages": said(i)}) + "\n" for i in range(n)).encode()


class Place:
    """A data folder, and what sft makes of it. The log is kept in `said`."""

    def __init__(self, folder):
        self.data, self.cache, self.said = folder / "M", folder / "cache", []
        (self.data / "chat").mkdir(parents=True)

    def write(self, name, content):
        path = self.data / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def pack(self, mixture=(("chat", 1),), length=64, **settings):
        sft = FinetuneConfig(mixture=dict(mixture), **settings)
        config = RunConfig(model=ModelConfig(sequence_len=length), data=DataConfig(dir=str(self.data)), sft=sft)
        log = SimpleNamespace(say=self.said.append)
        run = SimpleNamespace(config=config, cache_dir=self.cache, log=log, tokenizer=Bytes())
        rows = _dataset(run, "sft", sft)
        return bytes(i for i in rows.rows(range(len(rows)))["tokens"].ravel() if i < 256)

    def refused(self, match, **settings):
        """In the same words when asked again: nothing was kept."""
        for _ in range(2):
            with pytest.raises(UserError, match=match):
                self.pack(**settings)
        assert not list(self.cache.glob("packed/*"))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_file_that_was_rewritten_is_learnt_anew(place, suffix):
    pack = functools.partial(gzip.compress, mtime=0) if suffix == "jsonl.gz" else bytes
    place.write(f"chat/a.{suffix}", pack(chats("RED.")))
    path = place.data / f"chat/a.{suffix}"
    times = path.stat()
    assert b"RED." in place.pack() and b"RED." in place.pack() and "at hand" in place.said[-1]
    place.write(f"chat/a.{suffix}", pack(chats("BLUE")))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    got = place.pack()
    assert b"BLUE" in got and b"RED" not in got
    place.write(f"chat/a.{suffix}", pack(chats("RED.")))
    assert b"RED." in place.pack() and "at hand" in place.said[-1]


def test_tables_and_words_that_were_rewritten_are_learnt_anew(place):
    def table(answer):
        rows = [{"question": f"{i}?", "answer": f"{answer} #### 1"} for i in range(10)]
        place.data.joinpath("tasks").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place.data / "tasks" / "gsm8k_main_train.parquet")

    table("red")
    assert b"red" in place.pack([("gsm8k", 1)])
    table("tan")
    assert b"tan" in place.pack([("gsm8k", 1)])
    for letter in "qz":
        place.write("words/a.txt.gz", gzip.compress("\n".join(letter + c * 4 for c in "abcdefghijklmnop").encode()))
        assert letter.encode() in place.pack([("spelling", -20)], length=256)


def test_files_are_read_once_unless_they_changed(tmp_path, monkeypatch):
    path, memory = tmp_path / "a", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    first = content_hashes([path], memory)
    assert not memory.exists()  # so young a file may change once more within a tick of the clock
    monkeypatch.setattr("nanochat_jax.files.RECENT", -1)
    assert content_hashes([path], memory) == first and memory.exists()
    memory.write_text(memory.read_text().replace(first[0], "known"))
    assert content_hashes([path], memory) == ["known"]
    path.write_bytes(b"two")
    assert content_hashes([path], memory) not in (first, ["known"])
    with pytest.raises(UserError, match="cannot be read"):
        content_hashes([tmp_path / "none"], memory)


def test_the_cause_of_an_empty_mixture_is_named(place):
    place.write("chat/a.jsonl", b'{"messages": []}\n{"messages": 1}\n')
    place.refused("can be used: 2 left out .*no messages, first a.jsonl line 1")
    place.write("chat/a.jsonl", chats("yes").replace(b"assistant", b"butler"))
    place.refused("60 unknown role 'butler', first a.jsonl line 1")
    place.write("chat/a.jsonl", chats("yes").replace(b"?", b"?" * 100))
    place.refused("has a question longer than model.sequence_len, 64 tokens")
    place.write("chat/a.jsonl", b"[" + b",".join(chats("yes").splitlines()) + b"]")  # on one line
    assert b"yes" in place.pack()
