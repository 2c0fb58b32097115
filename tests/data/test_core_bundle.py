"""The CORE bundle from a local server: resumed over a bad line, checked, unpacked inside of its folder only."""

import http.server
import io
import json
import stat
import threading
import zipfile
import zlib

import pytest

from nanochat_jax.config import RunConfig, from_dict
from nanochat_jax.data import __main__ as command
from nanochat_jax.data import bundle, hub
from nanochat_jax.data.bundle import core_bundle, find_bundle, load_tasks
from nanochat_jax.errors import UserError

ROWS = "".join(json.dumps({"context": f"one {i}", "continuation": "two"}) + "\n" for i in range(3000))
FILES = {
    "core.yaml": "icl_tasks:\n-\n  label: t\n  dataset_uri: some/t.jsonl\n  num_fewshot: [0]\n"
    "  icl_task_type: language_modeling\n",
    "eval_meta_data.csv": "Eval Task,Random baseline\nt,0\n",
    "eval_data/some/t.jsonl": ROWS,
}


def archive(files=FILES, root="eval_bundle/", links=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        z.writestr("__MACOSX/eval_bundle/._core", "x")
        for name, text in files.items():
            info = zipfile.ZipInfo(root + name)
            if name in links:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, text)
    return out.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serves `data`; while there are `breaks`, an answer ends after so many bytes. `asked`: the ranges asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(here.status, len(here.data))

        def do_GET(self):
            here.asked.append(self.headers["Range"])
            place = int(self.headers["Range"][6:-1]) if self.headers["Range"] and here.ranges else 0
            self.answer(here.status if not place else 206, len(here.data) - place)
            body = here.data[place:] if here.status == 200 else b""
            self.wfile.write(body[: here.breaks.pop(0)] if here.breaks else body)

        def answer(self, status, length):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, *args):
            pass

    class Here:
        data, status, ranges, breaks, asked = archive(), 200, True, [], []

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    here = Here()
    here.breaks, here.asked = [], []
    here.url = f"http://127.0.0.1:{httpd.server_port}/eval_bundle.zip"
    monkeypatch.setattr(bundle, "URL", here.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield here
    httpd.shutdown()
    httpd.server_close()


def test_the_bundle_is_found_where_it_was_unpacked(server, tmp_path):
    folder, source = core_bundle(tmp_path / "hub")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {*FILES, "source.json"}
    assert (folder / "eval_data/some/t.jsonl").read_text() == ROWS
    assert source["url"] == server.url and source["size"] == len(server.data) and len(source["sha256"]) == 64
    assert [p.name for p in (tmp_path / "hub").iterdir() if not p.name.startswith(".")] == ["core"]
    assert [task.label for task in load_tasks(folder)] == ["t"]
    config = from_dict(RunConfig, {})
    assert find_bundle(config, tmp_path) == folder and find_bundle(config, tmp_path / "elsewhere") is None
    here = from_dict(RunConfig, {"evals": {"core_dir": str(tmp_path)}})
    assert find_bundle(here, tmp_path) == tmp_path
    asked = len(server.asked)
    assert core_bundle(tmp_path / "hub") == (folder, source) and len(server.asked) == asked


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_download_goes_on_where_the_line_broke(server, tmp_path, ranges):
    server.breaks, server.ranges = [1000, 5000 if ranges else 6000], ranges
    folder, _ = core_bundle(tmp_path)
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]
    assert (folder / "eval_data/some/t.jsonl").read_text() == ROWS


def test_a_bundle_that_is_half_there_is_made_anew(server, tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "core.yaml").write_text("old")
    folder, _ = core_bundle(tmp_path)
    assert (folder / "core.yaml").read_text() == FILES["core.yaml"]


def test_damage_is_seen_by_the_crc_and_fetched_again(server, tmp_path):
    good = server.data
    at = good.index(b'"one 77"')
    server.data = good[:at] + b'"one 78"' + good[at + 8 :]
    assert zlib.crc32(good) != zlib.crc32(server.data)
    with pytest.raises(UserError, match="came damaged .*CRC"):
        core_bundle(tmp_path)
    assert not (tmp_path / "core").exists() and not list(tmp_path.glob("*.zip"))
    server.data = good
    assert core_bundle(tmp_path)[0].is_dir()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "..\\outside.txt", "link"])
def test_nothing_is_written_outside_of_the_folder(server, tmp_path, name):
    server.data = archive({**FILES, name: "../../outside.txt"}, "" if name[0] == "/" else "eval_bundle/", {"link"})
    with pytest.raises(UserError, match="outside"):
        core_bundle(tmp_path / "deep" / "cache")
    assert not list(tmp_path.rglob("outside*")) and not (tmp_path / "deep" / "cache" / "core").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [(archive({"a.txt": "b"}), "no core.yaml"), (b"<html>no</html>", "came damaged")],
    ids=["zip", "page"],
)
def test_what_is_no_bundle(server, tmp_path, data, says):
    server.data = data
    with pytest.raises(UserError, match=says):
        core_bundle(tmp_path)


def test_a_disk_too_small(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="unpacks to .* GB free"):
        core_bundle(tmp_path)


def test_the_command_and_what_is_in_the_cache(server, tmp_path, monkeypatch, capsys):
    assert command.main(["download", "--dataset", "core", "--to", str(tmp_path)]) == 0
    line = capsys.readouterr().out
    assert f"1 of 1 tasks have their data in {tmp_path / 'core'}" in line and "SHA-256" in line
    assert command.main(["ls", "--to", str(tmp_path)]) == 0
    assert "the CORE bundle, 4 files" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["absent", "away", "broken"])
def test_out_of_reach_is_one_line_that_says_what_to_do(server, tmp_path, monkeypatch, capsys, trouble):
    if trouble == "away":
        monkeypatch.setattr(bundle, "URL", "http://127.0.0.1:9/eval_bundle.zip")  # the discard port: nobody listens
    server.status = {"absent": 403, "away": 200, "broken": 500}[trouble]
    assert command.main(["download", "--dataset", "core", "--to", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert not out and len(lines) == 1 and bundle.URL in lines[0] and "evals.core_dir" in lines[0]
