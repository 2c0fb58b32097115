"""Packing, packed datasets, the loader, the mixture, and where documents come from."""

import json

import numpy as np
import pytest
from evals_fakes import ByteTokenizer

from conftest import golden_files
from nanochat_jax.config import DataConfig
from nanochat_jax.data import embedded
from nanochat_jax.data.documents import open_documents
from nanochat_jax.data.embedded import EmbeddedDocuments, docstrings
from nanochat_jax.data.loader import Loader
from nanochat_jax.data.mixture import Mixture
from nanochat_jax.data.packed import PackedDataset, write_packed
from nanochat_jax.data.packing import best_fit, pack_conversations, pack_documents
from nanochat_jax.errors import UserError


def golden_packings():
    return [
        pytest.param(case, id=f"{path.stem}-{i}")
        for path in golden_files("behaviour*.json")
        for i, case in enumerate(json.loads(path.read_text())["bos_bestfit_packing"])
    ]


@pytest.mark.parametrize("case", golden_packings())
def test_best_fit_golden(case):
    documents = list(enumerate(case["doc_lengths_with_bos"]))
    size = case["refill_batch"]
    batches = (documents[i : i + size] for i in range(0, len(documents), size))
    rows = best_fit(batches, case["seq_len"] + 1, case["buffer_size"], crop=True, length=lambda d: d[1])
    for got, want in zip(rows, case["rows"], strict=False):
        named = [[doc[0] if id is not None else None, taken] for (doc, taken), (id, _) in zip(got, want)]
        assert named == want


class Texts:
    """Documents of these texts."""

    key = ["texts"]

    def __init__(self, train, val=("v" * 50,)):
        self._train, self._val = train, val

    def train(self):
        return iter(self._train)

    def val(self):
        return iter(self._val)


def test_pack_documents_keeps_order_of_bos_and_counts(tmp_path):
    tok = ByteTokenizer()
    texts = [chr(97 + i % 26) * (5 + i % 17) for i in range(200)]
    path = pack_documents(Texts(texts), tok, 32, tmp_path, split="train", buffer=10, log=lambda s: None)
    data = PackedDataset(path)
    rows = data.rows(range(len(data)))["tokens"]
    assert rows.shape[1] == 33 and (rows[:, 0] == tok.bos).all()
    data.verify()
    # every document is somewhere, from its beginning
    pieces = [p for row in rows.tolist() for p in "".join("|" if i == tok.bos else chr(i) for i in row)[1:].split("|")]
    assert all(len(set(p)) <= 1 for p in pieces)
    assert data.manifest["tokens"] == rows.size
    again = pack_documents(Texts(texts), tok, 32, tmp_path, split="train", buffer=10, log=lambda s: None)
    assert again == path and len(list(tmp_path.iterdir())) == 1


def test_pack_documents_limits_and_refuses_nothing(tmp_path):
    tok = ByteTokenizer()
    path = pack_documents(Texts(["abc" * 100] * 9), tok, 32, tmp_path, split="train", max_tokens=64, log=print)
    assert len(PackedDataset(path)) == 2
    with pytest.raises(UserError, match="do not fill one row"):
        pack_documents(Texts(["abc"]), tok, 32, tmp_path, split="train", log=print)


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pack(tmp_path, conversations, **more):
    settings = {"all_targets": False, "key": [len(conversations)], "log": lambda s: None, **more}
    return PackedDataset(pack_conversations(conversations, ByteTokenizer(), 32, tmp_path, **settings))


def test_conversations_longer_than_the_row_do_not_block_or_starve(tmp_path):
    tok = ByteTokenizer()
    long_answer, long_question = conversation("q", "a" * 100), conversation("q" * 100, "a")
    data = pack(tmp_path, [long_answer, long_question, *[conversation("hi", "yes")] * 5])
    got = data.rows(range(len(data)))
    assert data.manifest["cropped"] == 2 and data.manifest["dropped"] == 1
    assert got["mask"][:, 1:].any(axis=1).all()  # a row without targets would be a loss of 0 / 0
    targets = got["tokens"][got["mask"]]
    assert set(targets) <= {*b"yesa", tok.assistant_end}
    assert (targets == tok.assistant_end).sum() == 5


def test_all_targets_leaves_only_the_padding_out(tmp_path):
    data = pack(tmp_path, [conversation("hi", "yes")], all_targets=True)
    mask = data.rows([0])["mask"][0]
    assert mask.sum() == 10 and mask[:10].all()


def test_loader_is_a_function_of_seed_and_step(tmp_path):
    rows = [(np.full(9, i, np.uint16),) for i in range(10)]
    write_packed(tmp_path / "d", rows, 9, {})
    data = PackedDataset(tmp_path / "d")
    with Loader(data, seed=1, batch_rows=4) as a, Loader(data, seed=1, batch_rows=4) as b:
        in_order = [a.at(step)["tokens"][:, 0] for step in range(5)]
        assert np.array_equal(b.at(3)["tokens"][:, 0], in_order[3])  # resumed in the middle
        assert np.array_equal(b.at(1)["tokens"][:, 0], in_order[1])
    seen = np.concatenate(in_order)
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))  # epochs
    assert not np.array_equal(seen[:10], seen[10:])
    with Loader(data, seed=2, batch_rows=4) as other:
        assert not np.array_equal(other.at(0)["tokens"][:, 0], in_order[0])


def test_packed_dataset_over_several_shards_and_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_jax.data.packed.SHARD_ROWS", 3)
    write_packed(tmp_path / "d", [(np.full(4, i, np.uint16),) for i in range(8)], 4, {})
    data = PackedDataset(tmp_path / "d")
    assert data.rows([7, 0, 3])["tokens"][:, 0].tolist() == [7, 0, 3] and len(data) == 8
    np.save(tmp_path / "d" / "tokens_00001.npy", np.zeros((3, 4), np.uint16))
    with pytest.raises(UserError, match="shard 1 .* damaged"):
        PackedDataset(tmp_path / "d").verify()
    (tmp_path / "d" / "tokens_00002.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="missing or damaged"):
        PackedDataset(tmp_path / "d")


def test_writing_stops_halfway_leaves_nothing(tmp_path):
    def rows():
        yield (np.zeros(4, np.uint16),)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "d", rows(), 4, {})
    assert list(tmp_path.iterdir()) == []


class Numbers:
    def __init__(self, first, n):
        self.first, self.n = first, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"id": self.first + i}


def test_mixture_repeats_and_samples():
    got = [c["id"] for c in Mixture([(Numbers(0, 5), 2), (Numbers(100, 50), -7)], seed=3)]
    assert sorted(i for i in got if i < 100) == sorted([*range(5)] * 2)
    assert len({i for i in got if i >= 100}) == 7 == len(got) - 10
    assert got == [c["id"] for c in Mixture([(Numbers(0, 5), 2), (Numbers(100, 50), -7)], seed=3)]
    assert got != sorted(got)


def test_local_documents_pin_the_last_shard(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "pretrain").mkdir()
    data = DataConfig(dir=str(tmp_path))
    with pytest.raises(UserError, match="two or more"):
        open_documents(data, tmp_path)
    for i in range(3):
        pq.write_table(pa.table({"text": [f"shard {i}", ""]}), tmp_path / "pretrain" / f"s{i}.parquet")
    documents = open_documents(data, tmp_path)
    assert list(documents.train()) == ["shard 0", "shard 1"] and list(documents.val()) == ["shard 2"]
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "pretrain" / "s1.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        list(documents.train())
    (tmp_path / "pretrain" / "s0.parquet").write_bytes(b"half a downl")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(documents.train())


def test_docstrings():
    long = "A docstring that says something. " * 10
    assert docstrings(f'def f():\n    """{long}"""\n') == [long]
    assert docstrings("def f(") == [] and docstrings('def f(): "short"') == []


def test_embedded_documents_are_english_and_disjoint(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGES", ("optax",))
    all_modules = embedded._modules
    monkeypatch.setattr(embedded, "_modules", lambda root: all_modules(root)[:80])
    documents = EmbeddedDocuments()
    train, val = list(documents.train()), list(documents.val())
    assert sum(map(len, train)) > 500_000 and sum(map(len, val)) > 5_000
    assert not set(train) & set(val)
    assert sum(" the " in text for text in train) > len(train) / 2
    assert documents.key == EmbeddedDocuments().key
