"""Downloads from a local file system and a local server of the hub's layout: resumed, checked, pinned."""

import collections
import errno
import hashlib
import http.server
import itertools
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from nanochat_jax.config import DataConfig
from nanochat_jax.data import __main__ as command
from nanochat_jax.data import download as downloads
from nanochat_jax.data import hub, registry
from nanochat_jax.data.registry import hub_documents
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError

REPO = "someone/some-text"


class LocalHub(DirFileSystem):
    """A folder as the hub: states checksums, counts what is read, and may break off."""

    def __init__(self, folder):
        super().__init__(path=str(folder), fs=fsspec.filesystem("file"))
        self.broken_off_after = None
        self.opened = []
        self.lie = None

    def info(self, path, **kwargs):
        out = super().info(path, **kwargs)
        digest = hashlib.sha256(self.cat_file(path)).hexdigest()
        return {**out, "lfs": {"sha256": self.lie or digest}}

    def find(self, path, **kwargs):
        return {name: self.info(name) for name in super().find(path)}

    def open(self, path, mode="rb", **kwargs):
        file, hub_ = super().open(path, mode, **kwargs), self

        class Watched:
            def __enter__(self):
                return self

            def __exit__(self, *exc):
                file.close()

            def seek(self, place):
                hub_.opened.append((path.rsplit("/", 1)[-1], place))
                file.seek(place)

            def read(self, n):
                if hub_.broken_off_after is None:
                    return file.read(n)
                if hub_.broken_off_after <= 0:
                    raise ConnectionError("the line is dead")
                block = file.read(min(n, hub_.broken_off_after))
                hub_.broken_off_after -= len(block)
                return block

        return Watched()


def make_dataset(folder, n=5):
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"shard_{i:05d}.txt").write_bytes(b"%d" % (i % 10) * 1000)
    (folder / "README.md").write_text("what this is")
    (folder / "notes.json").write_text("[]")


@pytest.fixture
def fs(tmp_path, monkeypatch):
    make_dataset(tmp_path / "hub" / "datasets" / REPO)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    return LocalHub(tmp_path / "hub")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(documents):
    return [f.name for f in documents.files()]


# ------------------------------------------------------------------------------------------- what is fetched


def test_the_last_file_is_validation_whatever_the_number(fs, cache):
    for n in (1, 3):
        documents = hub_documents(REPO, None, n, cache, fs=fs)
        assert names(documents) == [f"shard_{i:05d}.txt" for i in (*range(n), 4)]
        assert list(documents.val()) == ["4" * 1000]
    assert list(documents.train()) == ["0" * 1000, "1" * 1000, "2" * 1000]
    with pytest.raises(UserError, match="has 4 training files"):
        hub_documents(REPO, None, 5, cache, fs=fs)


def test_one_kind_of_files_is_taken_and_a_folder_if_asked_for(fs, tmp_path, cache):
    folder = tmp_path / "hub" / "datasets" / REPO
    for name in ("en/a.jsonl.gz", "en/b.jsonl", "de/a.jsonl", "de/deep/b.jsonl.zst", "de/LICENSE.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert names(hub_documents(REPO, None, 1, cache, fs=fs)) == ["de/a.jsonl", "en/b.jsonl"]
    assert names(hub_documents(REPO, "en/", 1, cache, fs=fs)) == ["en/a.jsonl.gz", "en/b.jsonl"]
    assert names(hub_documents(REPO, "de", 1, cache, fs=fs)) == ["de/a.jsonl", "de/deep/b.jsonl.zst"]
    (folder / "en/a.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="has 0 training files"):
        hub_documents(REPO, None, 1, cache / "anew", fs=fs)


def test_settings_reach_the_documents(fs, cache, monkeypatch):
    monkeypatch.setattr(hub, "hub_filesystem", lambda: fs)
    monkeypatch.setitem(registry.NAMED, "ours", (REPO, None))
    data = DataConfig(source="hub", hub_pretrain="ours", hub_shards=2, text_column="body")
    documents = open_documents(data, cache)
    assert documents.repo == REPO and documents.column == "body" and len(documents.train_files) == 2
    assert not fs.opened  # nothing is fetched before its turn
    with pytest.raises(UserError, match="no .parquet, .jsonl or .txt"):
        open_documents(DataConfig(source="hub", hub_pretrain="ours", hub_folder="none"), cache)


def test_the_key_names_what_the_hub_has(fs, tmp_path, cache):
    key = hub_documents(REPO, None, 2, cache, fs=fs).key
    assert json.loads(json.dumps(key)) == key == hub_documents(REPO, None, 2, cache).key
    assert len({str(hub_documents(REPO, None, 2, cache, column=c).key) for c in ("text", "body")}) == 2
    assert hub_documents(REPO, None, 3, cache).key != key
    (tmp_path / "hub" / "datasets" / REPO / "shard_00004.txt").write_text("9" * 1000)
    assert hub_documents(REPO, None, 2, cache).key == key  # as it was listed
    assert hub_documents(REPO, None, 2, cache / "anew", fs=fs).key != key


def test_what_is_in_the_cache_is_not_asked_for_again(fs, cache):
    documents = hub_documents(REPO, None, 2, cache, fs=fs)
    texts = [*documents.train(), *documents.val()]
    asked = len(fs.opened)
    again = hub_documents(REPO, None, 2, cache)  # no hub at all
    assert [*again.train(), *again.val()] == texts and len(fs.opened) == asked


def test_files_are_fetched_in_their_turn_and_a_few_ahead(fs, tmp_path, cache):
    shutil.rmtree(tmp_path / "hub")
    make_dataset(tmp_path / "hub" / "datasets" / REPO, 20)
    documents = hub_documents(REPO, None, 19, cache, fs=fs)
    walk = documents.pieces("train")
    assert list(next(walk).texts()) == ["0" * 1000]
    for _ in range(2):
        next(walk)
    walk.close()
    assert 3 <= len(fs.opened) <= 3 + registry.AHEAD
    assert list(documents.train()) == [str(i % 10) * 1000 for i in range(19)]


def test_a_file_that_is_not_to_be_had_fails_in_its_turn(fs, tmp_path, cache):
    documents = hub_documents(REPO, None, 4, cache, fs=fs)
    (tmp_path / "hub" / "datasets" / REPO / "shard_00002.txt").unlink()
    walk = documents.train()
    assert [next(walk), next(walk)] == ["0" * 1000, "1" * 1000]
    with pytest.raises(UserError, match="the hub has no .*shard_00002"):
        next(walk)


def test_workers_that_walk_at_once_fetch_each_file_once(fs, cache):
    documents = hub_documents(REPO, None, 4, cache, fs=fs)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: list(documents.train()), range(6)))
    assert all(texts == found[0] for texts in found) and len(found[0]) == 4
    assert sorted(fs.opened) == [(f"shard_{i:05d}.txt", 0) for i in range(4)]


@pytest.mark.parametrize("n", [0, -1])
def test_no_shards_are_not_enough(fs, cache, n):
    with pytest.raises(UserError, match=f"hub_shards={n}"):
        hub_documents(REPO, None, n, cache, fs=fs)


@pytest.mark.parametrize("repo", ["no-owner", "../../up", "a/b/c", ""])
def test_names_that_are_no_dataset(fs, cache, repo):
    with pytest.raises(UserError, match="no name of a dataset.*climbmix, fineweb_edu, fineweb"):
        hub_documents(repo, None, 1, cache, fs=fs)
    with pytest.raises(UserError, match="hub_folder"):
        hub_documents(REPO, "../up", 1, cache, fs=fs)


def test_absent_dataset_and_absent_file_are_one_line(fs, tmp_path, cache):
    with pytest.raises(UserError, match="the hub has no"):
        hub.fetch(f"datasets/{REPO}/shard_00009.txt", tmp_path / "got", fs)
    with pytest.raises(UserError, match="no/such/ of the hub holds no"):
        hub_documents("no/such", None, 1, cache, fs=fs)


# ------------------------------------------------------------------------------------------------- one file


def test_a_download_goes_on_where_it_broke_off(fs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 100)
    fs.broken_off_after = 250
    source, target = f"datasets/{REPO}/shard_00001.txt", tmp_path / "got"
    with pytest.raises(UserError, match="cannot get .* the line is dead.* set data.dir"):
        hub.fetch(source, target, fs)
    assert not target.exists() and (tmp_path / "got.part").stat().st_size == 250
    fs.broken_off_after, fs.opened = None, []
    assert hub.fetch(source, target, fs).read_bytes() == b"1" * 1000
    assert fs.opened == [("shard_00001.txt", 250)]


def test_a_part_file_that_is_wrong_or_too_long_is_thrown_away(fs, tmp_path):
    source, target = f"datasets/{REPO}/shard_00001.txt", tmp_path / "got"
    for part in (b"?" * 500, b"1" * 1001):
        target.with_name("got.part").write_bytes(part)
        assert hub.fetch(source, target, fs).read_bytes() == b"1" * 1000
        target.unlink()


def test_damage_on_the_way_is_noticed(fs, tmp_path):
    fs.lie = "0" * 64
    with pytest.raises(UserError, match="not what the hub has"):
        hub.fetch(f"datasets/{REPO}/shard_00001.txt", tmp_path / "got", fs)
    assert not (tmp_path / "got").exists()


def test_a_dataset_that_changed_since_it_was_listed_is_noticed(fs, tmp_path, cache):
    documents = hub_documents(REPO, None, 1, cache, fs=fs)
    (tmp_path / "hub" / "datasets" / REPO / "shard_00000.txt").write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match="not what the hub has, or had when it was listed"):
        list(documents.train())


@pytest.mark.parametrize(
    "damage", [lambda b: b"!" + b[1:], lambda b: b[:-1], lambda b: b""], ids=["flip", "cut", "empty"]
)
def test_a_damaged_file_is_fetched_again(fs, cache, damage):
    documents = hub_documents(REPO, None, 1, cache, fs=fs)
    path = documents.fetch(documents.train_files[0])
    path.write_bytes(damage(path.read_bytes()))
    asked = len(fs.opened)
    assert list(documents.train()) == ["0" * 1000] and len(fs.opened) == asked + 1


def test_a_copied_file_is_read_once_and_not_fetched(fs, cache, monkeypatch):
    documents = hub_documents(REPO, None, 1, cache, fs=fs)
    path = documents.fetch(documents.train_files[0])
    path.write_bytes(path.read_bytes())  # the same, at another time
    documents = hub_documents(REPO, None, 1, cache)
    documents.fetch(documents.train_files[0])
    monkeypatch.setattr(hub, "_sha256", lambda path: pytest.fail("read again"))
    documents.fetch(documents.train_files[0])


def test_a_file_put_there_by_hand_is_checked_against_the_list(fs, tmp_path, cache):
    documents = hub_documents(REPO, None, 2, cache, fs=fs)
    for file in documents.train_files:
        shutil.copy(tmp_path / "hub" / "datasets" / REPO / file.name, documents.path(file))
    documents.path(documents.train_files[1]).write_bytes(b"half")
    assert list(documents.train()) == ["0" * 1000, "1" * 1000]
    assert fs.opened == [("shard_00001.txt", 0)]


def test_two_at_once_download_once(fs, cache):
    source, target = f"datasets/{REPO}/shard_00001.txt", cache / "shard"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: hub.fetch(source, target, fs), range(4)))
    assert target.read_bytes() == b"1" * 1000 and fs.opened == [("shard_00001.txt", 0)]


def test_who_watches_may_end_a_download(fs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 100)
    came = []

    def watch(n):
        came.append(n)
        if sum(came) >= 300:
            raise hub.Stopped

    with pytest.raises(hub.Stopped):
        hub.fetch(f"datasets/{REPO}/shard_00001.txt", tmp_path / "got", fs, on_block=watch)
    assert not (tmp_path / "got").exists() and (tmp_path / "got.part").stat().st_size == 300


@pytest.mark.parametrize("error", ["offline", "full"])
def test_what_cannot_pass_is_not_tried_again(error):
    from huggingface_hub.errors import OfflineModeIsEnabled

    asked = []

    def ask():
        asked.append(1)
        raise OfflineModeIsEnabled("off") if error == "offline" else OSError(errno.ENOSPC, "No space left")

    with pytest.raises(UserError, match="data.dir" if error == "offline" else "No space left.*data.cache_dir"):
        hub.asking("x", ask)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_to(fs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .*file.*data.cache_dir"):
        hub.fetch(f"datasets/{REPO}/shard_00001.txt", tmp_path / "file" / "got", fs)
    with pytest.raises(UserError, match="cannot write to .*data.cache_dir"):
        hub_documents(REPO, None, 1, tmp_path / "file", fs=fs)


@pytest.mark.parametrize("touched", [False, True])
def test_a_whole_cache_may_be_read_only(fs, cache, monkeypatch, touched):
    documents = hub_documents(REPO, None, 1, cache, fs=fs)
    path = documents.fetch(documents.train_files[0])
    if touched:
        path.write_bytes(path.read_bytes())

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(hub, "_alone", read_only)
    assert hub_documents(REPO, None, 1, cache).fetch(documents.train_files[0]) == path
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="cannot write to .*Read-only"):
        documents.fetch(documents.train_files[0])


def test_task_table_of_a_folder_of_the_hubs_layout(tmp_path, cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    pq.write_table(
        pa.table({"question": ["q"], "answer": ["#### 1"]}), folder / "main" / "train-00000-of-00001.parquet"
    )
    config = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")
    rows = hub.task_table(str(folder), "main", "train", cache)
    assert len(rows) == 1 and rows[0] == {"question": "q", "answer": "#### 1"}
    with pytest.raises(UserError, match="cannot load"):
        hub.task_table(str(folder), "main", "no-such-split", cache)
    assert downloads.download_tables([(str(folder), "main", "train")], cache)[0].startswith(
        f"{folder} main train: 1 rows"
    )


def test_tables_in_the_cache_are_read_without_a_word_to_the_hub(tmp_path, cache, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"question": ["q"]}), rows)
    for config in ("main", "socratic"):
        made = datasets.load_dataset("parquet", config, data_files=rows, cache_dir=tmp_path / "made")
        folder = Path(made["train"].cache_files[0]["filename"]).parent
        kept = cache / "openai___gsm8k" / config / "0.0.0" / "abc"  # as `datasets` keeps what came from the hub
        shutil.copytree(folder, kept)
        (kept / "parquet-train.arrow").rename(kept / "gsm8k-train.arrow")
        info = json.loads((kept / "dataset_info.json").read_text())
        (kept / "dataset_info.json").write_text(json.dumps({**info, "config_name": config, "dataset_name": "gsm8k"}))
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked for"))
        assert list(hub.task_table("openai/gsm8k", "main", "train", cache)) == [{"question": "q"}]
    (kept.parents[2] / "main" / "0.0.0" / "abc" / "gsm8k-train.arrow").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot load openai/gsm8k main train"):
        hub.task_table("openai/gsm8k", "main", "train", cache)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(fs, cache, monkeypatch, capsys):
    """run(*arguments) -> (exit status, stdout, stderr) of the command, with `fs` as the hub."""
    monkeypatch.setattr(hub, "hub_filesystem", lambda: fs)

    def call(*arguments):
        status = command.main([*arguments, "--to", str(cache)])
        return status, *capsys.readouterr()

    return call


def test_download_fills_the_cache_that_a_run_reads(run, fs, cache):
    status, out, _ = run("download", "--dataset", REPO, "-n", "3")
    assert status == 0
    assert re.fullmatch(
        rf"{REPO}: 3 training files and 1 for validation, 0\.00 GB in \S+; 0\.00 GB of it .* at \S+ MB/s\n", out
    )
    assert sorted(fs.opened) == [(f"shard_{i:05d}.txt", 0) for i in (0, 1, 2, 4)]
    documents = hub_documents(REPO, None, 3, cache)
    assert list(documents.train()) == ["0" * 1000, "1" * 1000, "2" * 1000] and len(fs.opened) == 4
    status, out, _ = run("download", "--dataset", REPO, "-n", "3")
    assert status == 0 and "MB/s" not in out and len(fs.opened) == 4


def test_download_goes_on_where_it_stopped(run, fs, cache, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 100)
    fs.broken_off_after = 1250
    status, out, err = run("download", "--dataset", REPO, "-n", "4", "--workers", "1")
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("error: cannot get datasets/someone/some-text")
    folder = cache / "someone--some-text"
    assert (folder / "shard_00000.txt").is_file() and (folder / "shard_00001.txt.part").stat().st_size == 250
    assert not (folder / "shard_00001.txt").exists()
    status, out, _ = run("ls")
    assert out == "someone/some-text: 1 of 5 files whole (0.00 GB), 1 half here (0.00 GB)\n"
    fs.broken_off_after, fs.opened = None, []
    assert run("download", "--dataset", REPO, "-n", "4", "--workers", "1")[0] == 0
    assert fs.opened[0] == ("shard_00001.txt", 250) and len(fs.opened) == 4
    assert run("ls")[1] == "someone/some-text: 5 of 5 files whole (0.00 GB)\n"


def test_ctrl_c_leaves_parts_that_the_next_call_takes_up(run, fs, cache, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 100)
    real = downloads.as_completed

    def interrupted(jobs):
        next(real(jobs))
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "as_completed", interrupted)
    status, out, err = run("download", "--dataset", REPO, "-n", "4", "--workers", "2")
    assert status == 130 and "goes on from there" in err and out == ""
    monkeypatch.setattr(downloads, "as_completed", real)
    assert run("download", "--dataset", REPO, "-n", "4")[0] == 0
    assert list(hub_documents(REPO, None, 4, cache).train()) == [str(i) * 1000 for i in range(4)]


def test_room_is_looked_for_before_anything_is_fetched(run, fs, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    big = [registry.HubFile(f"{i}.txt", 2_000_000_000, "0" * 64) for i in range(3)]
    monkeypatch.setattr(registry, "_listing", lambda *args: big)
    status, _, err = run("download", "--dataset", REPO, "-n", "2")
    assert status == 2 and "missing are 6.0 GB" in err and "has 0.0 GB free" in err and not fs.opened


def test_room_is_needed_for_what_is_missing_only(run, fs, cache, monkeypatch):
    assert run("download", "--dataset", REPO, "-n", "3")[0] == 0
    (cache / "someone--some-text" / "shard_00003.txt.part").write_bytes(b"3" * 400)
    for free, status in ((599, 2), (600, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert run("download", "--dataset", REPO, "-n", "4")[0] == status


def test_mistakes_are_one_line(run, fs, cache, monkeypatch):
    status, out, err = run("download", "--dataset", "fineweb-edu")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert all(name in err for name in ("climbmix", "fineweb_edu", "gsm8k", "smoltalk", "tasks"))
    status, _, err = run("download", "--dataset", "no/such")
    assert status == 2 and "no/such/ of the hub holds no" in err
    with pytest.raises(SystemExit):
        run("download", "--dataset", REPO, "-n", "0")
    assert run("ls")[1] == f"{cache} holds no datasets\n"
    cache.write_text("a file where the folder should be")
    status, _, err = run("download", "--dataset", REPO)
    assert status == 2 and err.count("\n") == 1 and "cannot write to" in err and "--to" in err


def test_without_a_network_one_line_says_what_to_do(cache, capsys):
    for dataset in ("climbmix", "gsm8k"):  # tests run with HF_HUB_OFFLINE
        assert command.main(["download", "--dataset", dataset, "--to", str(cache)]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: cannot") and "where there is one and copy runs/cache/hub here" in err


def test_tables_of_all_tasks_are_known():
    from evals.tasks import ROWS

    tables = command._tables()
    assert set(tables) == {*ROWS, "smoltalk", "tasks"}
    assert ("cais/mmlu", "all", "auxiliary_train") in tables["mmlu"]
    assert len(tables["tasks"]) == sum(len(r.hub_splits) for r in ROWS.values()) + 1


# ------------------------------------------------------------------------------------- the hub's own client


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the hub's interface over the local dataset; every third answer with a file's bytes breaks off."""
    folder = tmp_path / "hub" / "datasets" / REPO
    make_dataset(folder)
    answers = itertools.count(1)
    asked = collections.Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked[path.rsplit("/", 1)[-1]] += 1
            if path == f"/api/datasets/{REPO}":
                self.answer(json.dumps({"id": REPO, "sha": "0" * 40}).encode())
            elif path.startswith(f"/api/datasets/{REPO}/tree/main"):
                self.answer(json.dumps([self.entry(p) for p in sorted(folder.iterdir())]).encode())
            elif path.startswith(f"/datasets/{REPO}/resolve/main/"):
                data = (folder / path.rsplit("/", 1)[-1]).read_bytes()
                first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
                self.answer(data[first : last + 1], 206, breaks=next(answers) % 3 == 0)
            else:
                self.answer(b"", 404)

        def entry(self, path):
            data = path.read_bytes()
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return {"type": "file", "path": path.name, "size": len(data), "oid": "0" * 40, "lfs": lfs}

        def answer(self, data, status=200, breaks=False):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if breaks else data)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_downloads_by_the_hubs_own_client_over_a_bad_line(server, cache, monkeypatch, capsys):
    from huggingface_hub import HfFileSystem

    url, asked = server
    monkeypatch.setattr(hub, "hub_filesystem", lambda: HfFileSystem(endpoint=url, token=False))
    monkeypatch.setattr(hub, "BLOCK", 300)
    assert command.main(["download", "--dataset", REPO, "-n", "4", "--workers", "3", "--to", str(cache)]) == 0
    documents = hub_documents(REPO, None, 4, cache)
    assert [f.size for f in documents.files()] == [1000] * 5
    before = dict(asked)
    assert list(documents.train()) == [str(i) * 1000 for i in range(4)] and dict(asked) == before
    assert before["shard_00000.txt"] >= 1 and "notes.json" not in before
    with pytest.raises(UserError, match="the hub has no datasets/no/such"):
        hub_documents("no/such", None, 1, cache)
