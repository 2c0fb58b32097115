"""Downloads from a local file system of the hub's layout: resumed, checked, pinned."""

import errno
import hashlib
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from nanochat_jax.data import hub
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


@pytest.fixture
def fs(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "datasets" / REPO
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"shard_{i:05d}.parquet").write_bytes(bytes([i]) * 1000)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    return LocalHub(tmp_path / "hub")


def test_the_last_shard_is_validation_whatever_the_number(fs, tmp_path):
    for n in (1, 3):
        train, val = hub.pretrain_files(REPO, n, tmp_path / "cache", fs)
        assert [p.name for p in train] == [f"shard_{i:05d}.parquet" for i in range(n)]
        assert val.name == "shard_00004.parquet" and val.read_bytes() == b"\4" * 1000
    with pytest.raises(UserError, match="has 4 training shards"):
        hub.pretrain_files(REPO, 5, tmp_path / "cache", fs)


def test_what_is_in_the_cache_is_not_asked_for_again(fs, tmp_path):
    hub.pretrain_files(REPO, 2, tmp_path / "cache", fs)
    asked = len(fs.opened)
    again = hub.pretrain_files(REPO, 2, tmp_path / "cache", None)  # no hub at all
    assert len(fs.opened) == asked and again[0][0].is_file()


def test_a_download_goes_on_where_it_broke_off(fs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 100)
    fs.broken_off_after = 250
    source, target = f"datasets/{REPO}/shard_00001.parquet", tmp_path / "got"
    with pytest.raises(UserError, match="cannot get .* the line is dead.* set data.dir"):
        hub.fetch(source, target, fs)
    assert not target.exists() and (tmp_path / "got.part").stat().st_size == 250
    fs.broken_off_after, fs.opened = None, []
    assert hub.fetch(source, target, fs).read_bytes() == b"\1" * 1000
    assert fs.opened == [("shard_00001.parquet", 250)]


def test_damage_on_the_way_is_noticed(fs, tmp_path):
    fs.lie = "0" * 64
    with pytest.raises(UserError, match="not what the hub has"):
        hub.fetch(f"datasets/{REPO}/shard_00001.parquet", tmp_path / "got", fs)
    assert not (tmp_path / "got").exists()


def test_a_file_that_lost_bytes_later_is_fetched_again(fs, tmp_path):
    target = hub.fetch(f"datasets/{REPO}/shard_00002.parquet", tmp_path / "got", fs)
    target.write_bytes(b"half")
    assert hub.fetch(f"datasets/{REPO}/shard_00002.parquet", target, fs).read_bytes() == b"\2" * 1000


def test_absent_dataset_and_absent_file_are_one_line(fs, tmp_path):
    with pytest.raises(UserError, match="the hub has no"):
        hub.fetch(f"datasets/{REPO}/shard_00009.parquet", tmp_path / "got", fs)
    with pytest.raises(UserError, match="holds 0 parquet shards"):
        hub.pretrain_files("no/such", 1, tmp_path / "cache", fs)


def test_task_table_of_a_folder_of_the_hubs_layout(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    pq.write_table(
        pa.table({"question": ["q"], "answer": ["#### 1"]}), folder / "main" / "train-00000-of-00001.parquet"
    )
    config = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")
    rows = hub.task_table(str(folder), "main", "train", tmp_path / "cache")
    assert len(rows) == 1 and rows[0] == {"question": "q", "answer": "#### 1"}
    with pytest.raises(UserError, match="cannot load"):
        hub.task_table(str(folder), "main", "no-such-split", tmp_path / "cache")


@pytest.mark.parametrize("damage", [lambda b: b"!" + b[1:], lambda b: b[:-1]], ids=["flipped", "truncated"])
def test_a_damaged_file_is_fetched_again(fs, tmp_path, damage):
    path = hub.pretrain_files(REPO, 1, tmp_path / "cache", fs)[0][0]
    path.write_bytes(damage(path.read_bytes()))
    asked = len(fs.opened)
    hub.pretrain_files(REPO, 1, tmp_path / "cache", fs)
    assert path.read_bytes() == bytes(1000) and len(fs.opened) > asked


def test_a_copied_file_is_read_once_and_not_fetched(fs, tmp_path, monkeypatch):
    path = hub.pretrain_files(REPO, 1, tmp_path / "cache", fs)[0][0]
    path.write_bytes(path.read_bytes())  # the same, at another time
    hub.pretrain_files(REPO, 1, tmp_path / "cache", None)
    monkeypatch.setattr(hub, "_sha256", lambda path: pytest.fail("read again"))
    hub.pretrain_files(REPO, 1, tmp_path / "cache", None)


def test_two_at_once_download_once(fs, tmp_path):
    source, target = f"datasets/{REPO}/shard_00001.parquet", tmp_path / "cache" / "shard"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: hub.fetch(source, target, fs), range(4)))
    assert len({place for _, place in fs.opened}) == 1 and target.read_bytes() == b"\1" * 1000
    assert sum(name == "shard_00001.parquet" for name, _ in fs.opened) == 1


@pytest.mark.parametrize("n", [0, -1])
def test_no_shards_are_not_enough(fs, tmp_path, n):
    with pytest.raises(UserError, match=f"hub_shards={n}"):
        hub.pretrain_files(REPO, n, tmp_path / "cache", fs)


@pytest.mark.parametrize("repo", ["no-owner", "../../up", "a/b/c", ""])
def test_names_that_are_no_dataset(fs, tmp_path, repo):
    with pytest.raises(UserError, match="no name of a dataset"):
        hub.pretrain_files(repo, 1, tmp_path / "cache", fs)


@pytest.mark.parametrize("error", ["offline", "full"])
def test_what_cannot_pass_is_not_tried_again(tmp_path, error):
    from huggingface_hub.errors import OfflineModeIsEnabled

    asked = []

    def ask():
        asked.append(1)
        raise OfflineModeIsEnabled("off") if error == "offline" else OSError(errno.ENOSPC, "No space left")

    with pytest.raises(UserError, match="data.dir"):
        hub._asking("x", ask)
    assert len(asked) == 1
