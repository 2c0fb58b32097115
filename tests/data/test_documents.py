"""Where documents come from: files of every format, damage told, keys that name contents."""

import gzip
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import formats
from nanochat_jax.config import DataConfig
from nanochat_jax.data import documents, embedded
from nanochat_jax.data.documents import split_names
from nanochat_jax.data.embedded import EmbeddedDocuments, docstrings
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError
from nanochat_jax.formats import compression_of, kind_of, texts_of


def local_documents(folder, column="text", cache=None):
    return documents.local_documents(folder, column, cache or folder.parent / "cache")


TEXTS = ["one", "zwei — größer 🙂" * 5, "drei", "x", "vier\nfünf", "ende"]


def read(path, column="text"):
    return list(texts_of(path, column))


def lines(texts, end="\n"):
    return end.join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode()


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if suffix == ".zst" else data


# ---------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\r\n"], ids=["lf", "crlf", "blank lines"])
@pytest.mark.parametrize("last", ["", "\n", "\r\n\r\n"], ids=["no newline", "newline", "blank lines"])
def test_lines_are_documents_in_order(tmp_path, end, last):
    path = tmp_path / "a.jsonl"
    texts = [*TEXTS, "a" * 200_000, "b"]
    path.write_bytes(lines(texts, end) + last.encode())
    assert read(path) == texts


def test_empty_documents_are_left_out_and_halves_of_characters_replaced(tmp_path):
    rows = ['{"text": ""}', '{"text": null}', "  ", '{"text": "a\\ud83d b"}', '{"text": "\\ud83d\\ude42"}']
    (tmp_path / "a.ndjson").write_text("\ufeff" + "\n".join(rows))
    assert read(tmp_path / "a.ndjson") == ["a\ufffd b", "\U0001f642"]
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert read(tmp_path / "b.jsonl") == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "is not JSON"),
        ('{"text": "half of a downl', "is not JSON"),
        ('{"text": "\udcff"}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"title": "a", "body": "b"}', "has no field `text` .*; it has title, body"),
        ('["a"]', "has no field `text` .*; it holds list"),
        ('{"text": ["a"]}', "`text` holds list and not text"),
    ],
    ids=["no json", "half", "no utf-8", "deep", "no field", "no object", "no text"],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message, suffix):
    good = lines(TEXTS)
    data = good + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n" + good
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(data, suffix))
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix}, line {len(TEXTS) + 1}\b.*{message}"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_lines_and_damage_to_them(tmp_path, suffix):
    path, data = tmp_path / f"a.json{suffix}", compress(lines(TEXTS), suffix)
    path.write_bytes(data)
    assert read(path) == TEXTS
    path.write_bytes(data + compress(b"\n" + lines(["more"]), suffix))  # as `cat a.gz b.gz` makes it
    assert read(path) == [*TEXTS, "more"]
    for damaged in (data[:-3], data[: len(data) // 2], b"!" + data[1:], data + b"rubbish"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


# ----------------------------------------------------------------------------------------------------- text


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff\nEin Text\r\n\r\nmit Absätzen\n".encode() + b"\xff")
    assert read(tmp_path / "a.txt") == ["\nEin Text\n\nmit Absätzen\n\ufffd"]
    (tmp_path / "blank.txt").write_text(" \n\n")
    assert read(tmp_path / "blank.txt") == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents_of_a_text_file_that_are_set_apart(tmp_path, suffix):
    texts = ["one\n\ntwo", "größer 🙂" * 20, "x", "last"]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("\n<|endoftext|>\n".join(texts).encode(), suffix))
    assert [t.strip("\n") for t in read(path)] == texts


@pytest.mark.parametrize("mark", ["\n\n", "\r\n\r\n", "\n", " "], ids=["blank line", "crlf", "line", "space"])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_long_text_is_cut_where_it_may_be_and_loses_nothing(tmp_path, monkeypatch, mark, suffix):
    monkeypatch.setattr(formats, "LONG", 50)
    words = [f"wört{i}" for i in range(200)]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(mark.join(words).encode(), suffix))
    found = read(path)
    assert [w for t in found for w in t.split()] == words
    assert all(0 < len(t) <= 50 for t in found)
    assert len(found) < 60  # a stretch is more than half of what it may be


def test_text_without_any_place_to_cut_is_cut_hard(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONG", 50)
    (tmp_path / "a.txt").write_text("x" * 120)
    assert [len(t) for t in read(tmp_path / "a.txt")] == [50, 50, 20]


# -------------------------------------------------------------------------------------------------- parquet


def test_parquet_in_order_over_its_row_groups(tmp_path):
    texts = [f"{i} " * 50 for i in range(100)]
    pq.write_table(pa.table({"n": range(100), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet") == texts


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_that_are_text(tmp_path, kind):
    array = pa.array(["a", None, "", "ü", "a"]).cast(kind)
    pq.write_table(pa.table({"body": array}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "body") == ["a", "ü", "a"]


def test_parquet_that_is_not_to_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "words": [["a"]], "bytes": [b"\xff"]}), path)
    with pytest.raises(UserError, match=r"has no column `text` \(data.text_column\); it has n, words, bytes"):
        read(path)
    for column in ("n", "words", "bytes"):
        with pytest.raises(UserError, match=f"column `{column}` .* and not text"):
            read(path, column)
    pq.write_table(pa.table({"text": pa.array([b"\xff"]).view(pa.string())}), path)
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(path)


def test_damage_to_parquet_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text " * 1000]}), path, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:4] + bytes(60) + whole[64:], b"", b"half a downl"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as parquet"):
            read(path)


# -------------------------------------------------------------------------------------------------- folders


def test_local_documents_pin_the_last_file(tmp_path):
    (tmp_path / "pretrain").mkdir()
    data = DataConfig(dir=str(tmp_path))
    with pytest.raises(UserError, match="holds no files .* data.dir"):
        open_documents(data, tmp_path)
    for i in range(3):
        pq.write_table(pa.table({"text": [f"shard {i}", ""]}), tmp_path / "pretrain" / f"s{i}.parquet")
    documents = open_documents(data, tmp_path)
    assert list(documents.train()) == ["shard 0", "shard 1"] and list(documents.val()) == ["shard 2"]
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "pretrain" / "s1.parquet")
    walk = documents.train()
    assert next(walk) == "shard 0"  # what is read does not wait for what comes
    with pytest.raises(UserError, match="s1.parquet has no column `text`"):
        next(walk)


def test_formats_may_be_mixed_and_what_is_no_document_is_left_alone(tmp_path):
    folder = tmp_path / "pretrain"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "b"}'))
    pq.write_table(pa.table({"body": ["c"]}), folder / "c.parquet")
    (folder / "sub" / "D.TXT.ZST").write_bytes(compress(b"d", ".zst"))
    for name in ("z.parquet.json", "z.parquet.part", "z.json", ".z.txt", "README.md", "z.parquet.gz", "listing.json"):
        (folder / name).write_text("{}")
    documents = open_documents(DataConfig(dir=str(tmp_path), text_column="body"), tmp_path)
    assert list(documents.train()) == ["a", "b", "c"] and list(documents.val()) == ["d"]


def test_a_folder_that_itself_holds_the_files(tmp_path):
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "z.jsonl").write_text('{"messages": []}')
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    found = local_documents(tmp_path)
    assert list(found.train()) == ["a"] and list(found.val()) == ["b"] and found.notes == ()
    (tmp_path / "c.csv").touch()
    (tmp_path / "d.md").touch()
    assert local_documents(tmp_path).notes == (f"c.csv, d.md in {tmp_path} not read as documents",)
    with pytest.raises(UserError, match="holds no files"):
        local_documents(tmp_path / "not here")


@pytest.mark.parametrize("others", [(), ("test.txt",)], ids=["alone", "beside a test split"])
def test_a_single_file_has_both_splits(tmp_path, others):
    texts = [f"document {i}" for i in range(45)]
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(texts))
    for name in others:
        (tmp_path / name).write_text("not to be seen")
    found = local_documents(tmp_path)
    assert list(found.val()) == texts[::20]
    assert list(found.train()) == [text for text in texts if text not in texts[::20]]
    assert "train.txt is the only file to train on" in found.notes[-1]
    assert bool(others) == ("test.txt in" in found.notes[0])


def test_kinds_of_files():
    assert kind_of("x/a.parquet") == "parquet" and kind_of("a.b.jsonl.zst") == kind_of("en/c4.json.gz") == "lines"
    assert kind_of("a.TXT") == "text" and kind_of("a.TXT.GZ") == "text"
    assert [compression_of(Path(n)) for n in ("a.jsonl.zst", "a.TXT.GZ", "a.txt")] == ["zstd", "gzip", None]
    assert not any(map(kind_of, ("a.json", "a.parquet.gz", ".a.txt", "a.gz", "txt", "a.txt.part", "a.txt.json", "")))


@pytest.mark.parametrize(
    "names, train, val",
    [
        ([], [], ""),
        (["a"], ["a"], "a"),
        (["test.txt", "train.txt"], ["train.txt"], "train.txt"),
        (["a", "b", "c"], ["a", "b"], "c"),
        (["train-0.txt", "train-1.txt"], ["train-0.txt"], "train-1.txt"),
        (["d/test-0", "d/train-0", "d/train-1", "d/validation-0"], ["d/train-0", "d/train-1"], "d/validation-0"),
        (["test/a", "train/a", "train/b"], ["train/a"], "train/b"),
        (["how-to.txt", "test-one.txt", "train-plan.txt"], ["how-to.txt", "test-one.txt"], "train-plan.txt"),
        (["dev.txt", "train.txt"], ["train.txt"], "dev.txt"),
    ],
)
def test_training_and_validation_files_by_name(names, train, val):
    assert split_names(names) == (train, val)


def test_keys_name_contents_and_nothing_else(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    key = local_documents(tmp_path).key
    assert json.loads(json.dumps(key)) == key == local_documents(tmp_path).key
    assert local_documents(tmp_path, "body").key != key
    tmp_path.rename(tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved")
    assert local_documents(moved).key == key
    seen = [key]
    for name, text in (("a", "A"), ("c", "C"), ("0", "new")):
        (moved / f"{name}.txt").write_text(text)
        seen.append(local_documents(moved).key)
        assert seen.count(seen[-1]) == 1


@pytest.mark.parametrize("place", [0, 1_500_000, -1])
def test_any_change_of_a_large_file_changes_the_key(tmp_path, place):
    (tmp_path / "b.txt").write_text("b")
    path, data = tmp_path / "a.txt", bytearray(b"x" * 3_000_000)
    path.write_bytes(data)
    times = path.stat()
    key = local_documents(tmp_path).key
    data[place] = 0
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert local_documents(tmp_path).key != key


def test_a_worker_reads_a_copy_without_jax(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    code = (
        "import pickle, sys; d = pickle.load(sys.stdin.buffer);"
        "print([list(d.train()), list(d.val())], 'jax' in sys.modules)"
    )
    given = pickle.dumps(local_documents(tmp_path))
    said = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    assert said.stdout.decode().strip() == "[['one'], ['two']] False"


# ------------------------------------------------------------------------------------------------- embedded


def test_docstrings():
    long = "A docstring that says something. " * 10
    assert docstrings(f'def f():\n    """{long}"""\n') == [long]
    assert docstrings("def f(") == [] and docstrings('def f(): "short"') == []


def test_embedded_documents_are_english_and_disjoint(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGES", ("optax",))
    all_modules = embedded._modules
    monkeypatch.setattr(embedded, "_modules", lambda root: all_modules(root)[:80])
    documents = EmbeddedDocuments(tmp_path)
    train, val = list(documents.train()), list(documents.val())
    assert sum(map(len, train)) > 500_000 and sum(map(len, val)) > 5_000
    assert not set(train) & set(val)
    assert sum(" the " in text for text in train) > len(train) / 2
    assert (train, val) == embedded.collect()  # the cache gives back what was collected
    monkeypatch.setattr(embedded, "collect", lambda: pytest.fail("collected again"))
    again = pickle.loads(pickle.dumps(EmbeddedDocuments(tmp_path)))
    assert again.key == documents.key and list(again.train()) == train


def test_embedded_texts_do_not_depend_on_the_interpreter():
    """As for conversations in test_tasks.py."""
    texts = [text for _, made in itertools.islice(embedded._made(), 100) for text in made]
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "859ecd97c4ae7fd8"


def test_embedded_documents_where_nothing_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "collect", lambda: (["a"], ["b"]))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .* data.cache_dir"):
        list(EmbeddedDocuments(tmp_path / "cache").train())
