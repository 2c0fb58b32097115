"""Programs that mean harm: each is contained, named for what it did, and leaves nothing behind."""

import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest
from hostile_programs import PRELUDE, PROGRAMS, Hostile
from sandbox_fakes import open_pool, processes_with

from evals.sandbox import Outcome

SECRET = "7b1c9e"


class Evaluator:
    """What an attack could reach for: a folder, two listening sockets, an environment; and the pool that runs it."""

    def __init__(self, folder: Path):
        self.folder, self.token = folder, folder.name
        (folder / "kept").write_text(SECRET)
        self.tcp, self.unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "socket"))
        self.unix.listen()
        for listener in (self.tcp, self.unix):
            listener.setblocking(False)
        (folder / "temp").mkdir()
        tempfile.tempdir = str(folder / "temp")
        os.environ["NANOCHAT_SECRET"] = SECRET
        self.pool = open_pool()
        self.workers = set(processes_with(self.token))
        self.threads = threading.active_count()

    def run(self, program: Hostile):
        constants = {
            "OUTSIDE": str(self.folder),
            "EVALUATOR": os.getpid(),
            "PORT": self.tcp.getsockname()[1],
            "UNIX": str(self.folder / "socket"),
        }
        lines = [f"{name} = {value!r}" for name, value in constants.items()]
        timeout = 0.5 if program.outcome is Outcome.TIMED_OUT else 20.0
        return self.pool.run("\n".join([*lines, PRELUDE, program.source]), timeout, memory_mb=256)

    def check_unharmed(self):
        """Nothing but the worker runs, which answers; nothing was written, connected or left."""
        assert set(processes_with(self.token)) == self.workers
        assert self.pool.run("import os; assert os.listdir() == []", 5, 256).ok
        assert sorted(os.listdir(self.folder)) == ["kept", "socket", "temp"]
        assert (self.folder / "kept").read_text() == SECRET and os.listdir(self.folder / "temp") == []
        for listener in (self.tcp, self.unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert threading.active_count() == self.threads

    def close(self):
        self.pool.close()
        tempfile.tempdir = None
        del os.environ["NANOCHAT_SECRET"]
        self.tcp.close()
        self.unix.close()
        assert processes_with(self.token) == {}


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    shared_memory = set(os.listdir("/dev/shm"))
    it = Evaluator(tmp_path_factory.mktemp("evaluator"))
    yield it
    it.close()
    assert {name for name in set(os.listdir("/dev/shm")) - shared_memory if name.isdigit()} == set()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_a_hostile_program_is_contained_and_named(evaluator, program):
    got = evaluator.run(program)
    assert (got.outcome, program.says in str(got)) == (program.outcome, True), (str(got), got.stderr)
    assert SECRET not in got.stdout + got.stderr + got.detail
    evaluator.check_unharmed()
