"""Packing in the background: the same rows with any number of threads, whoever is killed, whoever packs beside it."""

import contextlib
import errno
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from data_fakes import Bytes, Texts, limit_files, pack_documents, print_and_exit, random_texts, tell_modules

from nanochat_jax.data import packer
from nanochat_jax.data.fit import best_fit
from nanochat_jax.data.packed import PackedDataset
from nanochat_jax.data.packing import pack_conversations
from nanochat_jax.errors import UserError

ROWS = 8  # of a shard
SEQ = 31


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("nanochat_jax.data.packed.SHARD_ROWS", ROWS)


def start(documents, cache, tok=None, **options):
    """Packing of the training documents with a buffer of ten."""
    return pack_documents(documents, tok or Bytes(), SEQ, cache, **{"buffer": 10, "log": lambda line: None, **options})


def packed(documents, cache, **options):
    """The whole dataset, once it is there."""
    with start(documents, cache, **options) as data:
        len(data)
        return data


def contents(folder):
    """Every file but the lock, and but the last state, which stays where the end of packing is killed at its end."""
    files = [p for p in folder.iterdir() if p.name != ".lock" and not p.name.startswith("resume")]
    return {p.name: p.read_bytes() for p in files}


TEXTS = random_texts(500)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What packing in one go, in this process, leaves of TEXTS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat_jax.data.packed.SHARD_ROWS", ROWS)
        return contents(packed(Texts(TEXTS), tmp_path_factory.mktemp("whole"), workers=0).path)


# ---------------------------------------------------------------------------------------------- what is packed


def test_the_rows_are_those_of_best_fit_over_the_documents_in_order_and_then_over_what_was_cropped(whole, tmp_path):
    tok = Bytes()
    documents = [[tok.bos, *tok.encode(text)] for text in TEXTS]

    def batches(of):  # (texts,) lists of documents
        return (sum(of[i : i + packer.REFILL], []) for i in range(0, len(of), packer.REFILL))

    used = list(best_fit(batches([[d] for d in documents]), SEQ + 1, 10, crop=True))
    rest = {id(d): d[taken:] for row in used for d, taken in row}
    parts = [
        [[tok.bos, *r[i : i + SEQ]] for r in [rest.get(id(d), [])] for i in range(0, len(r), SEQ)] for d in documents
    ]
    used += best_fit(batches(parts), SEQ + 1, 10, crop=True)
    want = [[i for document, taken in row for i in document[:taken]] for row in used]
    data = packed(Texts(TEXTS), tmp_path, workers=0)
    assert data.rows(range(len(data)))["tokens"].tolist() == want
    manifest = json.loads(whole["manifest.json"])
    assert manifest["complete"] and manifest["rows"] == len(want) and manifest["tokens"] == len(want) * (SEQ + 1)
    assert 0 < manifest["documents"] <= len(TEXTS)
    given, taken = sum(len(d) - 1 for d in documents), sum(taken - 1 for row in used for _, taken in row)
    # what waits when the last row of a walk cannot be filled counts as neither
    assert 0 <= given - taken - manifest["tokens_cropped"] < 2 * SEQ
    for name in ("rows", "documents", "tokens", "tokens_cropped"):
        assert manifest[name] == sum(shard[name] for shard in manifest["shards"])
    assert {shard["rows"] for shard in manifest["shards"][:-1]} == {ROWS}
    assert not list(data.path.glob("resume*"))


def test_a_long_text_is_read_to_its_end_before_its_rows_come_again(tmp_path):
    """Also where packing is stopped and resumed in the second walk."""
    texts = tuple("".join(chr(0x100 + (97 * n + i) % 5000) for i in range(700)) for n in range(4))
    for goal in (3, 20, 21, None):
        data = packed(Texts(texts), tmp_path, workers=0, goal_rows=goal)
    seen = data.rows(range(len(data)))["tokens"]
    pairs = {pair for row in seen.tolist() for pair in zip(row, row[1:])}
    wanted = {pair for text in texts for pair in zip(text.encode(), text.encode()[1:])}
    assert len(wanted - pairs) < len(wanted) / SEQ  # those that a cut parts
    assert data.manifest["documents"] == 4 and 0 <= data.manifest["tokens_cropped"] < 3 * SEQ


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(whole, tmp_path, workers):
    assert contents(packed(Texts(TEXTS), tmp_path / "a", workers=workers).path) == whole


def test_how_the_documents_are_spread_over_files_changes_nothing(whole, tmp_path):
    assert contents(packed(Texts(TEXTS, per_file=200), tmp_path, workers=0).path) == whole


def test_a_goal_is_a_prefix_and_a_larger_one_goes_on_from_it(whole, tmp_path):
    lines = []
    few = packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=10)
    assert len(few) == few.available() == 10 and few.complete  # of 16, which are two shards
    with pytest.raises(IndexError):
        few.rows([10])
    assert contents(few.path)["tokens_00001.npy"] == whole["tokens_00001.npy"]
    assert len(packed(Texts(TEXTS), tmp_path, workers=1, goal_rows=20)) == 20
    data = packed(Texts(TEXTS), tmp_path, workers=0, log=lines.append)
    assert contents(data.path) == whole and "packed rows" in lines[-1]
    assert list((tmp_path / "packed").iterdir()) == [data.path]
    packed(Texts(TEXTS), tmp_path, workers=1, log=lines.append)
    assert "at hand" in lines[-1]


def test_a_vocabulary_beyond_sixteen_bits(whole, tmp_path):
    tok = Bytes(shift=70_000)
    data = packed(Texts(TEXTS), tmp_path, tok=tok, workers=1)
    rows = data.rows(range(len(data)))["tokens"]
    assert rows.dtype == np.uint32 and data.manifest["dtype"] == "uint32" and (rows[:, 0] == tok.bos).all()
    narrow = packed(Texts(TEXTS), tmp_path, workers=0)
    assert np.array_equal(rows - 70_000, narrow.rows(range(len(narrow)))["tokens"])


def test_conversations_come_in_the_same_order_with_any_number_of_threads(tmp_path):
    mixture = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
        for text in TEXTS
    ]
    options = {"all_targets": False, "key": [], "log": lambda line: None}
    want = pack_conversations(mixture, Bytes(), 100, tmp_path / "a", workers=0, **options)
    got = pack_conversations(mixture, Bytes(), 100, tmp_path / "b", workers=2, **options)
    assert contents(got.path) == contents(want.path) and len(got) > ROWS
    mixture[300] = {"messages": [{"role": "assistant", "content": "first"}]}
    with pytest.raises(UserError, match="message 0"):
        pack_conversations(mixture, Bytes(), 100, tmp_path / "c", workers=2, **options)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


# ---------------------------------------------------------------------------------------------- while it is packed


def test_rows_are_read_while_others_are_packed(whole, tmp_path):
    gate = tmp_path / "gate"
    with start(Texts(TEXTS, gate=gate, hold=400), tmp_path, workers=2) as data:
        assert data.wait_for(1) >= ROWS and not data.complete
        early = data.rows(range(ROWS))["tokens"]
        gate.touch()
        assert len(data) == json.loads(whole["manifest.json"])["rows"] and data.complete
        assert np.array_equal(data.rows(range(ROWS))["tokens"], early)
    assert contents(data.path) == whole


def test_who_comes_second_reads_and_takes_over(whole, tmp_path):
    gate = tmp_path / "gate"
    documents = Texts(TEXTS, gate=gate, hold=400)
    with start(documents, tmp_path, workers=1) as first, start(documents, tmp_path, workers=1) as second:
        assert second.wait_for(ROWS) >= ROWS
        first.close()
        gate.touch()
        len(second)
    assert contents(second.path) == whole


def test_a_wait_can_be_ended(tmp_path):
    stop = threading.Event()
    with start(Texts(TEXTS, gate=tmp_path / "never", hold=0), tmp_path, workers=1) as data:
        threading.Timer(0.2, stop.set).start()
        assert data.wait_for(1, stop) == 0


# ---------------------------------------------------------------------------------------------- killed


class Kill(BaseException):
    pass


def test_killed_between_any_two_changes_of_the_folder(whole, tmp_path, monkeypatch):
    """Every rename and removal in turn is the one before which it dies."""
    done = False
    for n in itertools.count():
        left = [n]

        def then_dies(do, left=left):
            def act(*args, **more):
                if not left[0]:
                    raise Kill
                left[0] -= 1
                return do(*args, **more)

            return act

        cache = tmp_path / str(n)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", then_dies(os.replace))
            patch.setattr("pathlib.Path.unlink", then_dies(type(tmp_path).unlink))
            try:
                packed(Texts(TEXTS[:90]), cache, workers=0)
                done = True
            except Kill:
                pass
        data = packed(Texts(TEXTS[:90]), cache, workers=0)
        if n == 0:
            want = contents(data.path)
        assert contents(data.path) == want, n
        if done:
            break
    assert n > 20


def packers():
    """The processes that pack for this one."""
    return psutil.Process().children()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(whole, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(3):
        with start(Texts(TEXTS, pause=0.002), tmp_path, workers=2) as data:
            if data.complete:
                break
            data.wait_for(data.available() + 1)
            time.sleep(rng.uniform(0, 0.4))
            for process in packers():
                process.kill()
            with contextlib.suppress(UserError):  # unless it was at its end
                len(data)
    assert contents(packed(Texts(TEXTS), tmp_path, workers=2).path) == whole


def test_a_packer_that_is_killed_is_an_error(tmp_path, capfd):
    with pytest.raises(UserError, match=r"killed \(status 9\); is memory short\? The same command goes on"):
        packed(Texts(TEXTS, act=print_and_exit), tmp_path, workers=1)
    out, err = capfd.readouterr()
    assert not out and err.count("what is printed is no message") == 1
    documents = Texts(TEXTS, gate=tmp_path / "never")
    with start(documents, tmp_path, workers=1) as data, pytest.raises(UserError, match="SIGKILL"):
        while data.packer.working():
            for process in packers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def test_the_packer_ends_with_the_process_that_trains(tmp_path):
    code = (
        "import sys; from pathlib import Path; from data_fakes import *\n"
        "folder = Path(sys.argv[1])\n"
        "data = pack_documents(Texts(random_texts(50), gate=folder / 'never'), Bytes(), 31, folder, workers=2)\n"
        "print('started', flush=True); data.wait_for(1)"
    )
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env = {**os.environ, "PYTHONPATH": path}
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    assert trainer.stdout.readline() == b"started\n"
    deadline = time.monotonic() + 60
    while not (found := psutil.Process(trainer.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    gone, alive = psutil.wait_procs(found, timeout=60)
    assert len(gone) == 1 and not alive


def test_a_damaged_state_packs_from_the_beginning(whole, tmp_path):
    data = packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=20)
    (state,) = data.path.glob("resume_*")
    raw = bytearray(state.read_bytes())
    raw[len(raw) // 2] ^= 1
    state.write_bytes(raw)
    assert contents(packed(Texts(TEXTS), tmp_path, workers=0).path) == whole


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("damage", [os.remove, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_without_the_places_of_crops_nothing_is_guessed(tmp_path, damage):
    few = packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=ROWS)
    damage(few.path / "cropped_00000.npy")
    with pytest.raises(UserError, match="damaged; remove it to have it packed anew"):
        packed(Texts(TEXTS), tmp_path, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_cannot_read_reaches_the_trainer(tmp_path, workers):
    error = UserError("shard 3 is damaged; fetch it again")
    with pytest.raises(UserError, match="shard 3 is damaged; fetch it again"):
        packed(Texts(TEXTS, bad=333, error=error), tmp_path, workers=workers)
    with pytest.raises((RuntimeError, ZeroDivisionError), match="by zero"):
        packed(Texts(TEXTS, bad=333, error=ZeroDivisionError("by zero")), tmp_path, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_that_fill_no_row(tmp_path, workers):
    with pytest.raises(UserError, match="do not fill one row"):
        packed(Texts(("abc",)), tmp_path, workers=workers)


def test_a_full_disk(whole, tmp_path):
    with pytest.raises(UserError, match="cannot write to .*File too large.*make room") as told:
        packed(Texts(TEXTS, act=limit_files), tmp_path, workers=1)
    assert "\n" not in str(told.value)
    (folder,) = (tmp_path / "packed").iterdir()
    assert contents(folder) == {}
    assert contents(packed(Texts(TEXTS), tmp_path, workers=0).path) == whole


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*data.cache_dir"):
        packed(Texts(TEXTS), tmp_path / "file", workers=0)
    data = packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=10)

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packer, "claim", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        packed(Texts(TEXTS), tmp_path, workers=0)
    assert len(packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=10)) == len(data)  # reading takes no lock


def test_a_folder_that_nobody_packs_is_not_waited_for(tmp_path):
    path = packed(Texts(TEXTS), tmp_path, workers=0, goal_rows=10).path
    with pytest.raises(UserError, match="was not packed to its end"):
        len(PackedDataset(path))
    assert PackedDataset(path).wait_for(12) == 16


def test_the_packer_imports_no_jax(tmp_path):
    with pytest.raises(UserError) as told:
        packed(Texts(TEXTS, act=tell_modules), tmp_path, workers=1)
    names = str(told.value).split()
    assert "data_fakes" in names and "nanochat_jax.data.packer" in names
    assert not {"jax", "jaxlib", "grain", "flax"} & set(names)
