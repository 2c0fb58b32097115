"""Downloads by the hub's own client from a local server of its interface: resumed, checked, pinned."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import BLOCK, COMMIT, REPO, FakeHub

from nanochat_jax.config import DataConfig
from nanochat_jax.data import __main__ as command
from nanochat_jax.data import download as downloads
from nanochat_jax.data import hub, registry
from nanochat_jax.data.registry import hub_documents
from nanochat_jax.data.sources import open_documents
from nanochat_jax.errors import UserError


def make_dataset(folder, n=5):
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"shard_{i:05d}.txt").write_bytes(b"%d" % (i % 10) * 1000)
    (folder / "README.md").write_text("what this is")
    (folder / "notes.json").write_text("[]")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub. The client writes every 100 bytes, and does not pause between tries."""
    make_dataset(tmp_path / "hub" / REPO)
    server = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield server
    server.close()


@pytest.fixture
def dataset(server):
    return server.folder / REPO


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def get(server, target, **options):
    """The second shard of the dataset, 1000 ones."""
    sha256 = hashlib.sha256(b"1" * 1000).hexdigest()
    return hub.fetch(server.file("shard_00001.txt"), target, size=1000, sha256=sha256, **options)


def names(documents):
    return [f.name for f in documents.all_files()]


# ------------------------------------------------------------------------------------------- what is fetched


def test_the_last_file_is_validation_whatever_the_number(server, cache):
    for n in (1, 3):
        documents = hub_documents(REPO, None, n, cache)
        assert names(documents) == [f"shard_{i:05d}.txt" for i in (*range(n), 4)]
        assert list(documents.val()) == ["4" * 1000]
    assert list(documents.train()) == ["0" * 1000, "1" * 1000, "2" * 1000]
    with pytest.raises(UserError, match="has 4 training files"):
        hub_documents(REPO, None, 5, cache)


def test_one_kind_of_files_is_taken_and_a_folder_if_asked_for(server, dataset, tmp_path, cache):
    folder = dataset
    for name in ("en/a.jsonl.gz", "en/b.jsonl", "de/a.jsonl", "de/deep/b.jsonl.zst", "de/LICENSE.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert names(hub_documents(REPO, None, 1, cache)) == ["de/a.jsonl", "en/b.jsonl"]
    assert names(hub_documents(REPO, "en/", 1, cache)) == ["en/a.jsonl.gz", "en/b.jsonl"]
    assert names(hub_documents(REPO, "de", 1, cache)) == ["de/a.jsonl", "de/deep/b.jsonl.zst"]
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "en/a.parquet")
    alone = hub_documents(REPO, None, 1, cache / "anew")
    assert names(alone) == ["en/a.parquet"] and (list(alone.train()), list(alone.val())) == (["b"], ["a"])
    assert "en/a.parquet is the only file to train on" in alone.notes[0]
    with pytest.raises(UserError, match="has 1 training files"):
        hub_documents(REPO, None, 2, cache / "anew")


def test_settings_reach_the_documents(server, cache, monkeypatch):
    monkeypatch.setitem(registry.NAMED, "ours", (REPO, None))
    data = DataConfig(source="hub", hub_pretrain="ours", hub_shards=2, text_column="body")
    documents = open_documents(data, cache)
    assert documents.repo == REPO and documents.column == "body" and len(documents.train_files) == 2
    assert not server.opened  # nothing is fetched before its turn
    with pytest.raises(UserError, match=f"the server has no .*{REPO}/none;"):
        open_documents(DataConfig(source="hub", hub_pretrain="ours", hub_folder="none"), cache)


def test_the_key_names_what_the_hub_has(server, dataset, tmp_path, cache):
    key = hub_documents(REPO, None, 2, cache).key
    assert json.loads(json.dumps(key)) == key == hub_documents(REPO, None, 2, cache).key
    assert len({str(hub_documents(REPO, None, 2, cache, column=c).key) for c in ("text", "body")}) == 2
    assert hub_documents(REPO, None, 3, cache).key != key
    (dataset / "shard_00004.txt").write_text("9" * 1000)
    assert hub_documents(REPO, None, 2, cache).key == key  # as it was listed
    assert hub_documents(REPO, None, 2, cache / "anew").key != key


def test_what_is_in_the_cache_is_not_asked_for_again(server, cache):
    documents = hub_documents(REPO, None, 2, cache)
    texts = [*documents.train(), *documents.val()]
    asked = len(server.opened)
    again = hub_documents(REPO, None, 2, cache)
    assert [*again.train(), *again.val()] == texts and len(server.opened) == asked


def test_files_are_fetched_in_their_turn_and_a_few_ahead(server, dataset, tmp_path, cache):
    shutil.rmtree(tmp_path / "hub")
    make_dataset(dataset, 20)
    documents = hub_documents(REPO, None, 19, cache)
    walk = documents.files("train")
    assert list(next(walk)) == ["0" * 1000]
    for _ in range(2):
        next(walk)
    walk.close()
    assert 3 <= len(server.opened) <= 3 + registry.PREFETCH
    assert list(documents.train()) == [str(i % 10) * 1000 for i in range(19)]


def test_a_file_that_is_not_to_be_had_fails_in_its_turn(server, dataset, tmp_path, cache):
    documents = hub_documents(REPO, None, 4, cache)
    (dataset / "shard_00002.txt").unlink()
    walk = documents.train()
    assert [next(walk), next(walk)] == ["0" * 1000, "1" * 1000]
    with pytest.raises(UserError, match="the server has no .*shard_00002"):
        next(walk)


def test_workers_that_walk_at_once_fetch_each_file_once(server, cache):
    documents = hub_documents(REPO, None, 4, cache)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: list(documents.train()), range(6)))
    assert all(texts == found[0] for texts in found) and len(found[0]) == 4
    assert sorted(server.opened) == [(f"shard_{i:05d}.txt", 0) for i in range(4)]


@pytest.mark.parametrize("n", [0, -1])
def test_no_shards_are_not_enough(server, cache, n):
    with pytest.raises(UserError, match=f"hub_shards={n}"):
        hub_documents(REPO, None, n, cache)


@pytest.mark.parametrize("repo", ["no-owner", "../../up", "a/b/c", ""])
def test_names_that_are_no_dataset(server, cache, repo):
    with pytest.raises(UserError, match="no name of a dataset.*climbmix, fineweb_edu, fineweb"):
        hub_documents(repo, None, 1, cache)
    with pytest.raises(UserError, match="hub_folder"):
        hub_documents(REPO, "../up", 1, cache)


def test_absent_dataset_and_absent_file_are_one_line(server, dataset, tmp_path, cache):
    with pytest.raises(UserError, match="the server has no .*shard_00009"):
        hub.fetch(server.file("shard_00009.txt"), tmp_path / "got")
    with pytest.raises(UserError, match="the server has no .*no/such;"):
        hub_documents("no/such", None, 1, cache)


# ------------------------------------------------------------------------------------------------- one file


def test_a_download_goes_on_where_it_broke_off(server, dataset, tmp_path, monkeypatch):
    server.dies_after = 250
    target = tmp_path / "got"
    with pytest.raises(UserError, match="cannot get .*shard_00001.txt .*RemoteProtocolError.* set data.dir"):
        get(server, target)
    assert not target.exists() and (tmp_path / "got.part").stat().st_size == 200  # whole blocks
    server.dies_after, server.opened = None, []
    assert get(server, target).read_bytes() == b"1" * 1000
    assert server.opened == [("shard_00001.txt", 200)]


def test_a_part_file_that_is_wrong_or_too_long_is_thrown_away(server, dataset, tmp_path):
    target = tmp_path / "got"
    for part in (b"?" * 500, b"1" * 1001):
        target.with_name("got.part").write_bytes(part)
        assert get(server, target).read_bytes() == b"1" * 1000
        target.unlink()


def test_damage_on_the_way_is_noticed(server, dataset, tmp_path):
    server.lie = "0" * 64
    documents = hub_documents(REPO, None, 1, tmp_path)
    with pytest.raises(UserError, match="not what the hub has"):
        documents.fetch(documents.val_file)
    assert not documents.path(documents.val_file).exists() and not list(tmp_path.rglob("*.part"))


def test_a_dataset_that_changed_since_it_was_listed_is_noticed(server, dataset, tmp_path, cache):
    documents = hub_documents(REPO, None, 1, cache)
    (dataset / "shard_00000.txt").write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match="not what the hub has, or had when it was listed"):
        list(documents.train())


@pytest.mark.parametrize(
    "damage", [lambda b: b"!" + b[1:], lambda b: b[:-1], lambda b: b""], ids=["flip", "cut", "empty"]
)
def test_a_damaged_file_is_fetched_again(server, cache, damage):
    documents = hub_documents(REPO, None, 1, cache)
    path = documents.fetch(documents.train_files[0])
    path.write_bytes(damage(path.read_bytes()))
    asked = len(server.opened)
    assert list(documents.train()) == ["0" * 1000] and len(server.opened) == asked + 1


def test_a_copied_file_is_read_once_and_not_fetched(server, cache, monkeypatch):
    documents = hub_documents(REPO, None, 1, cache)
    path = documents.fetch(documents.train_files[0])
    path.write_bytes(path.read_bytes())  # the same, at another time
    documents = hub_documents(REPO, None, 1, cache)
    documents.fetch(documents.train_files[0])
    monkeypatch.setattr(hub, "_sha256", lambda path: pytest.fail("read again"))
    documents.fetch(documents.train_files[0])


def test_a_file_put_there_by_hand_is_checked_against_the_list(server, dataset, tmp_path, cache):
    documents = hub_documents(REPO, None, 2, cache)
    for file in documents.train_files:
        shutil.copy(dataset / file.name, documents.path(file))
    documents.path(documents.train_files[1]).write_bytes(b"half")
    assert list(documents.train()) == ["0" * 1000, "1" * 1000]
    assert server.opened == [("shard_00001.txt", 0)]


def test_two_at_once_download_once(server, cache):
    target = cache / "shard"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: get(server, target), range(4)))
    assert target.read_bytes() == b"1" * 1000 and server.opened == [("shard_00001.txt", 0)]


def test_who_watches_may_end_a_download(server, dataset, tmp_path, monkeypatch):
    came = []

    def watch(n):
        came.append(n)
        if sum(came) >= 300:
            raise hub.Stopped

    with pytest.raises(hub.Stopped):
        get(server, tmp_path / "got", on_block=watch)
    assert not (tmp_path / "got").exists() and (tmp_path / "got.part").stat().st_size == 200


@pytest.mark.parametrize("error", ["offline", "full"])
def test_what_cannot_pass_is_not_tried_again(error, tmp_path, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    asked = []

    def ask(*args, **kwargs):
        asked.append(1)
        raise OfflineModeIsEnabled("off") if error == "offline" else OSError(errno.ENOSPC, "No space left")

    with pytest.raises(UserError, match="data.dir" if error == "offline" else "No space left.*data.cache_dir"):
        monkeypatch.setattr("huggingface_hub.file_download.http_get", ask)
        hub.fetch("x", tmp_path / "got")
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_to(server, dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .*file.*data.cache_dir"):
        get(server, tmp_path / "file" / "got")
    with pytest.raises(UserError, match="cannot write to .*data.cache_dir"):
        hub_documents(REPO, None, 1, tmp_path / "file")


@pytest.mark.parametrize("touched", [False, True])
def test_a_whole_cache_may_be_read_only(server, cache, monkeypatch, touched):
    documents = hub_documents(REPO, None, 1, cache)
    path = documents.fetch(documents.train_files[0])
    if touched:
        path.write_bytes(path.read_bytes())

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(hub, "_lock", read_only)
    monkeypatch.setattr(hub, "_note", read_only)
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
def run(server, cache, capsys):
    """run(*arguments) -> (exit status, stdout, stderr) of the command."""

    def call(*arguments):
        status = command.main([*arguments, "--to", str(cache)])
        return status, *capsys.readouterr()

    return call


def test_download_fills_the_cache_that_a_run_reads(run, server, cache):
    status, out, _ = run("download", "--dataset", REPO, "-n", "3")
    assert status == 0
    assert re.fullmatch(
        rf"{REPO}: 3 training files and 1 for validation, 0\.00 GB in \S+; 0\.00 GB of it .* at \S+ MB/s\n", out
    )
    assert sorted(server.opened) == [(f"shard_{i:05d}.txt", 0) for i in (0, 1, 2, 4)]
    documents = hub_documents(REPO, None, 3, cache)
    assert list(documents.train()) == ["0" * 1000, "1" * 1000, "2" * 1000] and len(server.opened) == 4
    status, out, _ = run("download", "--dataset", REPO, "-n", "3")
    assert status == 0 and "MB/s" not in out and len(server.opened) == 4


def test_download_goes_on_where_it_stopped(run, server, cache, monkeypatch):
    server.dies_after = 1250
    status, out, err = run("download", "--dataset", REPO, "-n", "4", "--workers", "1")
    assert (
        status == 2
        and out == ""
        and err.splitlines()[-1].startswith(f"error: cannot get {server.file('shard_00001.txt')}")
    )
    folder = cache / "someone--some-text"
    assert (folder / "shard_00000.txt").is_file() and (folder / "shard_00001.txt.part").stat().st_size == 200
    assert not (folder / "shard_00001.txt").exists()
    status, out, _ = run("ls")
    assert out == "someone/some-text: 1 of 5 files whole (0.00 GB), 1 half here (0.00 GB)\n"
    server.dies_after, server.opened = None, []
    assert run("download", "--dataset", REPO, "-n", "4", "--workers", "1")[0] == 0
    assert server.opened[0] == ("shard_00001.txt", 200) and len(server.opened) == 4
    assert run("ls")[1] == "someone/some-text: 5 of 5 files whole (0.00 GB)\n"


def test_ctrl_c_leaves_parts_that_the_next_call_takes_up(run, server, cache, monkeypatch):
    real, calls = hub.fetch, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(hub, "fetch", interrupted)
    status, out, err = run("download", "--dataset", REPO, "-n", "4", "--workers", "2")
    assert status == 130 and "the same command resumes" in err and out == ""
    monkeypatch.setattr(hub, "fetch", real)
    assert run("download", "--dataset", REPO, "-n", "4")[0] == 0
    assert list(hub_documents(REPO, None, 4, cache).train()) == [str(i) * 1000 for i in range(4)]


def test_room_is_looked_for_before_anything_is_fetched(run, server, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    big = [registry.HubFile(f"{i}.txt", 2_000_000_000, "0" * 64) for i in range(3)]
    monkeypatch.setattr(registry, "_listing", lambda *args: big)
    status, _, err = run("download", "--dataset", REPO, "-n", "2")
    assert status == 2 and "missing are 6.00 GB" in err and "has 0.00 GB free" in err and not server.opened


def test_room_is_needed_for_what_is_missing_only(run, server, cache, monkeypatch):
    assert run("download", "--dataset", REPO, "-n", "3")[0] == 0
    (cache / "someone--some-text" / "shard_00003.txt.part").write_bytes(b"3" * 400)
    for free, status in ((599, 2), (600, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert run("download", "--dataset", REPO, "-n", "4")[0] == status


def test_mistakes_are_one_line(run, server, cache, monkeypatch):
    status, out, err = run("download", "--dataset", "fineweb-edu")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert all(name in err for name in ("climbmix", "fineweb_edu", "gsm8k", "smoltalk", "tasks"))
    status, _, err = run("download", "--dataset", "no/such")
    assert status == 2 and "no/such; without a network" in err
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
    from evals.tasks import CHATS, ROWS

    tables = command._tables()
    assert set(tables) == {*ROWS, *CHATS, "smoltalk", "tasks"} - {"chat"}
    assert tables["xlam"] == [("Salesforce/xlam-function-calling-60k", None, "train")]
    assert ("cais/mmlu", "all", "auxiliary_train") in tables["mmlu"]
    assert len(tables["tasks"]) == sum(len(r.hub_splits) for r in ROWS.values()) + 1


# ------------------------------------------------------------------------------------- a bad line, and kills


def test_a_line_that_breaks_again_and_again(server, cache):
    server.breaks = 3
    assert command.main(["download", "--dataset", REPO, "-n", "4", "--workers", "3", "--to", str(cache)]) == 0
    assert list(hub_documents(REPO, None, 4, cache).train()) == [str(i) * 1000 for i in range(4)]
    assert "notes.json" not in {name for name, _ in server.opened}


def test_what_is_fetched_later_is_of_the_commit_that_was_listed(server, dataset, cache):
    hub_documents(REPO, None, 1, cache)
    assert list(hub_documents(REPO, None, 2, cache).train()) == ["0" * 1000, "1" * 1000]
    assert all(COMMIT in path for path in server.asked if "resolve" in path or "tree" in path)


def test_a_listing_without_a_commit_is_that_of_main(server, cache):
    path = cache / REPO.replace("/", "--") / registry.LISTING
    hub_documents(REPO, None, 1, cache)
    path.write_text(json.dumps([{k: v for k, v in f.items() if k != "revision"} for f in json.loads(path.read_text())]))
    assert list(hub_documents(REPO, None, 1, cache).train()) == ["0" * 1000]
    assert any("resolve/main" in path for path in server.asked)


def test_killed_twice_and_resumed(tmp_path, cache):
    """Nothing that was on the disk is asked for again."""
    folder = tmp_path / "hub" / REPO
    folder.mkdir(parents=True)
    contents = {f"{i}.txt": os.urandom(40 * BLOCK) for i in range(3)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    server = FakeHub(tmp_path / "hub")
    code = (
        "import sys; from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 16\n"
        "from nanochat_jax.data.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "download", "--dataset", REPO, "-n", "2", "--to", str(cache)]
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}

    def here():
        found = cache.rglob("*.txt*")
        return {p.name.removesuffix(".part"): p.stat().st_size for p in found if p.suffix in (".txt", ".part")}

    server.pause = 0.02
    for kill in (1, 2):
        before, seen = here(), len(server.opened)
        child = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
        while sum(here().values()) < kill * 36 * BLOCK:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert dict(server.opened[seen:]) == {name: before.get(name, 0) for name in contents}
    server.pause, before, seen = 0, here(), len(server.opened)
    assert all(0 < before[name] < len(data) for name, data in contents.items())
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(server.opened[seen:]) == before
    kept = cache / REPO.replace("/", "--")
    assert {name: (kept / name).read_bytes() for name in contents} == contents
    assert not list(kept.rglob("*.part"))
    server.close()
