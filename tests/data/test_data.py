"""Packing, packed datasets, the order of rows, the loader, and the mixture."""

import json
import threading

import jax
import numpy as np
import pytest
from data_fakes import Bytes, Texts, pack_documents

from conftest import golden_files
from nanochat_jax.config import MeshConfig
from nanochat_jax.data.fit import best_fit
from nanochat_jax.data.loader import MAX_WINDOW_SHARDS, Loader, RowOrder
from nanochat_jax.data.mixture import Mixture
from nanochat_jax.data.packed import PackedDataset, write_packed
from nanochat_jax.data.packing import pack_conversations
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding


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


# -------------------------------------------------------------------------------------------------- packing


def pack_texts(texts, cache, **options):
    options = {"buffer": 10, "workers": 0, "log": lambda line: None, **options}
    return pack_documents(Texts(tuple(texts)), Bytes(), 32, cache, **options)


def test_pack_documents_keeps_documents_from_their_beginning(tmp_path):
    tok = Bytes()
    data = pack_texts((chr(97 + i % 26) * (5 + i % 17) for i in range(200)), tmp_path)
    rows = data.rows(range(len(data)))["tokens"]
    assert rows.shape[1] == 33 and (rows[:, 0] == tok.bos).all()
    pieces = [p for row in rows.tolist() for p in "".join("|" if i == tok.bos else chr(i) for i in row)[1:].split("|")]
    assert all(len(set(p)) <= 1 for p in pieces)
    assert data.manifest["tokens"] == rows.size


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pack(tmp_path, conversations, **more):
    settings = {"all_targets": False, "key": [len(conversations)], "log": lambda s: None, **more}
    return pack_conversations(conversations, Bytes(), 32, tmp_path, **settings)


def test_conversations_longer_than_the_row_do_not_block_or_starve(tmp_path):
    tok = Bytes()
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


# ------------------------------------------------------------------------------------------- a packed dataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eight rows of four tokens in three shards, the last of them of two; row i is full of i."""
    monkeypatch.setattr("nanochat_jax.data.packed.SHARD_ROWS", 3)
    write_packed(tmp_path / "d", [(np.full(4, i, np.uint16),) for i in range(8)], 4, {"tokenizer": "ours"})
    return tmp_path / "d"


def test_rows_by_index_over_several_shards(folder):
    data = PackedDataset(folder)
    assert len(data) == 8 and data.rows([7, 0, 3, 0])["tokens"][:, 2].tolist() == [7, 0, 3, 0]
    assert data.rows([])["tokens"].shape == (0, 4)
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            data.rows([0, wrong])


def test_a_folder_without_rows_is_refused(folder):
    with pytest.raises(UserError, match="no packed rows"):
        PackedDataset(folder / "none")


def test_another_tokenizer_or_length_has_rows_of_its_own(tmp_path):
    texts, folders = ["a" * 100] * 9, set()
    for tok in (Bytes(), Bytes(shift=1)):
        for length in (32, 31):
            packed = pack_documents(Texts(tuple(texts)), tok, length, tmp_path, workers=0)
            folders.add(packed.path)
            assert packed.rows([0])["tokens"].tolist() == [[tok.bos, *tok.encode("a" * length)]]
    assert len(folders) == 4


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "a flipped byte": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "missing": lambda path: path.unlink(),
    "no array": lambda path: path.write_bytes(b"no array"),
    "empty": lambda path: path.write_bytes(b""),
    "fewer rows": lambda path: np.save(path, np.ones((2, 4), np.uint16)),
    "another type": lambda path: np.save(path, np.ones((3, 4), np.int16)),
    "another shard": lambda path: path.write_bytes(path.with_name("tokens_00000.npy").read_bytes()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_gives_no_rows(folder, what):
    DAMAGE[what](folder / "tokens_00001.npy")
    data = PackedDataset(folder)
    assert data.rows([0, 7])["tokens"][:, 0].tolist() == [0, 7]
    with pytest.raises(UserError, match="remove .* packed anew"):
        data.rows([0, 4])
    with pytest.raises(UserError, match="remove .* packed anew"):
        data.touch(0, 8)


def test_writing_that_stops_halfway_leaves_nothing(tmp_path):
    def rows():
        yield (np.zeros(4, np.uint16),)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "d", rows(), 4, {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- order of rows


def order(rows, seed=0, shard_rows=4):
    return RowOrder(seed, shard_rows, lambda n: min(n, rows))


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 61, 64, 100])
def test_every_row_comes_once_an_epoch(rows):
    got = order(rows).rows_at(np.arange(3 * rows)).reshape(3, rows)
    assert (np.sort(got, axis=1) == np.arange(rows)).all()
    if rows > 8:
        assert not np.array_equal(got[0], got[1]) and not np.array_equal(got[1], got[2])


def test_the_order_is_a_function_of_seed_and_position():
    whole = order(100).rows_at(np.arange(300))
    positions = np.random.default_rng(0).permutation(300)
    assert np.array_equal(order(100).rows_at(positions), whole[positions])
    assert np.array_equal([order(100).rows_at(np.array([p]))[0] for p in (0, 99, 100, 299)], whole[[0, 99, 100, 299]])
    assert not np.array_equal(order(100, seed=1).rows_at(np.arange(100)), whole[:100])


def test_windows_grow_from_one_shard_and_later_rows_change_only_the_last():
    got = order(1000).rows_at(np.arange(1000))
    start = 0
    for shards in (1, 1, 2, 4, 8, 16, 32):
        window = got[start : start + 4 * shards]
        assert sorted(window) == list(range(start, start + 4 * shards))
        start += 4 * shards
    assert np.array_equal(order(70).rows_at(np.arange(64)), got[:64])
    large = RowOrder(0, 1, lambda n: n)
    sizes = [end - start for _, _, start, end in map(large.window_of, (0, 1, 64, 128, 192, 1000))]
    assert sizes == [1, 1, MAX_WINDOW_SHARDS, MAX_WINDOW_SHARDS, MAX_WINDOW_SHARDS, MAX_WINDOW_SHARDS]


def test_no_more_rows_are_waited_for_than_the_window_has():
    asked = []
    waiting = RowOrder(0, 4, lambda n: asked.append(n) or n)
    waiting.rows_at(np.arange(10))
    assert max(asked) == 16


# ---------------------------------------------------------------------------------------------- the loader


def numbered(path, rows=50, masked=False):
    """Rows of nine tokens, of which row i is full of i; with a mask that leaves the last target out."""
    mask = (np.arange(9) < 8,) if masked else ()
    write_packed(path, [(np.full(9, i, np.uint16), *mask) for i in range(rows)], 9, {})
    return PackedDataset(path)


def one_device():
    return sharding.rows(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), leading=1)


def loader(data, seed=1, accumulation=2, rows=8, put=None):
    return Loader(data, seed=seed, accumulation=accumulation, rows=rows, sharding=put or one_device())


def test_a_batch_is_what_the_order_says(tmp_path):
    data = numbered(tmp_path / "d")
    want = RowOrder(1, data.shard_rows, data.wait_for).rows_at(np.arange(5 * 16)).reshape(5, 2, 8)
    with loader(data) as batches:
        for step in (0, 1, 2, 4, 1, 2):  # in sequence, and taken up elsewhere
            got = batches.at(step)
            assert got["tokens"].shape == got["targets"].shape == (2, 8, 8) and got["tokens"].dtype == np.int32
            assert np.array_equal(got["tokens"], np.repeat(want[step][..., None], 8, axis=-1))
            assert np.array_equal(got["targets"], got["tokens"])


def test_what_the_mask_leaves_out_is_no_target(tmp_path):
    with loader(numbered(tmp_path / "d", masked=True)) as batches:
        got = batches.at(0)
    assert (np.asarray(got["targets"])[..., -1] == -1).all() and (np.asarray(got["targets"])[..., :-1] >= 0).all()


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2)], ids=str)
def test_batches_are_the_same_on_every_mesh(tmp_path, mesh):
    data, put = numbered(tmp_path / "d"), sharding.rows(sharding.make_mesh(MeshConfig(*mesh)), leading=1)
    with loader(data) as one, loader(data, put=put) as many:
        for step in range(5):
            got, want = many.at(step), one.at(step)
            for name in ("tokens", "targets"):
                assert got[name].sharding == put and np.array_equal(got[name], want[name])


def test_each_host_reads_the_rows_of_its_own_devices_once(tmp_path, monkeypatch):
    data, read = numbered(tmp_path / "d"), []
    put = sharding.rows(sharding.make_mesh(MeshConfig(2, 2, 2)), leading=1)
    found = data.rows
    data.rows = lambda indices: read.extend(indices.tolist()) or found(indices)

    def rows_of(devices, step=1):
        """What is read where only these devices are this process's."""
        read.clear()

        def make(shape, placed, part, dtype):
            return {d: part(index) for d, index in placed.devices_indices_map(shape).items() if d in devices}

        with monkeypatch.context() as patch, loader(data, put=put) as batches:
            patch.setattr(jax, "make_array_from_callback", make)
            batches._make(step)
        return list(read)

    order = put.mesh.devices.ravel().tolist()
    first, second, whole = rows_of(order[:4]), rows_of(order[4:]), rows_of(order)
    assert len(first) == len(second) == 8 and len(whole) == 16
    assert sorted(first + second) == sorted(whole) and not set(first) & set(second)


def test_damage_is_told_by_the_step_that_meets_it(folder):
    flip(folder / "tokens_00001.npy")
    data = PackedDataset(folder)
    with (
        loader(data, accumulation=1, rows=1) as batches,
        pytest.raises(UserError, match="shard 1 .* is damaged") as told,
    ):
        for step in range(8):
            batches.at(step)
    assert "\n" not in str(told.value)


def test_closing_ends_a_wait_for_rows_that_do_not_come(tmp_path, monkeypatch):
    class Never:
        def working(self):
            return True

    monkeypatch.setattr("nanochat_jax.data.packed.SHARD_ROWS", 50)
    data = numbered(tmp_path / "d")
    data.manifest["complete"], data.packer, data.refresh = False, Never(), lambda: None
    with loader(data, accumulation=1, rows=50) as batches:
        batches.at(0)
        ahead = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
    for thread in ahead:
        thread.join(timeout=5)
    assert ahead and not any(thread.is_alive() for thread in ahead)


# ---------------------------------------------------------------------------------------------- mixtures


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
