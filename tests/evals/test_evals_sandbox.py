"""run_program: what every program can rely on and none gets past, with full isolation, with some and with none."""

import os
import tempfile
import threading
import time

import pytest
from sandbox_fakes import MODES, open_pool, processes_with

from evals.sandbox import Outcome, Result, pool, run_program
from evals.sandbox.supervisor import OUTPUT_BYTES
from nanochat_jax.errors import UserError

WITHOUT_NAMESPACES = ["seccomp only", "neither"]


@pytest.fixture(scope="module", params=MODES)
def run(request):
    """A Pool's run with this mode's layers."""
    with open_pool(request.param) as opened:
        yield lambda source, timeout=20.0, memory_mb=512: opened.run(source, timeout, memory_mb)


@pytest.fixture(scope="module", params=WITHOUT_NAMESPACES)
def run_without_namespaces(request):
    with open_pool(request.param) as opened:
        yield lambda source: opened.run(source, 20.0, 512)


def test_a_program_that_runs_to_its_end(run):
    got = run("import math\nprint(math.gcd(12, 18))\n")
    assert got == Result(Outcome.PASSED, detail="", stdout="6\n", stderr="") and got.ok and str(got) == "passed"


@pytest.mark.parametrize(
    ("source", "outcome", "says"),
    [
        ("assert 1 == 2, 'wrong'", Outcome.FAILED, "AssertionError: wrong"),
        ("def f(", Outcome.FAILED, "SyntaxError"),
        ("print(os)", Outcome.FAILED, "NameError"),  # nothing of the sandbox is in sight
        ("import evals", Outcome.FAILED, "ModuleNotFoundError"),
        ("input()", Outcome.FAILED, "EOFError"),
        ("x = '\ud800'; print(x)", Outcome.FAILED, "UnicodeEncodeError"),  # the program's mistake and not ours
        ("open('missing')", Outcome.FAILED, "FileNotFoundError"),
        ("def f(): f()\nf()", Outcome.FAILED, "RecursionError"),
        ("x = bytearray(2 * 10**9)", Outcome.OUT_OF_MEMORY, "MemoryError"),
        ("x = []\nwhile True: x.append(' ' * 10**6)", Outcome.OUT_OF_MEMORY, "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**8)", Outcome.DISK_LIMIT, "File too large"),
        ("f = [open('/dev/null') for _ in range(200)]", Outcome.OPEN_FILES_LIMIT, "Too many open files"),
        ("import sys; sys.exit(0)\nassert False", Outcome.LEFT_EARLY, "SystemExit: 0"),
        ("exit()", Outcome.LEFT_EARLY, "SystemExit: None"),
        ("import os; os._exit(0)", Outcome.LEFT_EARLY, "exit status 0"),
        ("import atexit, os; atexit.register(os._exit, 7)", Outcome.LEFT_EARLY, "exit status 7"),
        ("raise KeyboardInterrupt", Outcome.FAILED, "KeyboardInterrupt"),
        ("import os; os.abort()", Outcome.KILLED, "SIGABRT"),
        ("while True: print('x' * 1000)", Outcome.TOO_MUCH_OUTPUT, "too much output"),
    ],
)
def test_what_happened_is_said_by_name(run, source, outcome, says):
    got = run(source)
    assert (got.outcome, got.ok) == (outcome, False) and says in str(got), (str(got), got.stderr)
    if outcome is Outcome.FAILED:
        assert got.detail == got.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "import atexit, time; atexit.register(time.sleep, 60)",
        "import time; time.sleep(60)",
    ],
)
def test_what_does_not_end_is_killed(run, source):
    started = time.monotonic()
    got = run(source, timeout=0.4)
    assert got.outcome is Outcome.TIMED_OUT and time.monotonic() - started < 5


def test_huge_output_is_drained_and_cut(run):
    got = run("import sys\nprint('x' * 5_000_000)\nsys.stderr.write('y' * 3_000_000)\n")
    assert got.ok and len(got.stdout) == len(got.stderr) == OUTPUT_BYTES


def test_ordinary_programs_are_not_hindered(run):
    source = """
import asyncio, dataclasses, os, random, re, shutil, sys, tempfile, threading, typing
seen = []
threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(16)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(seen) == 16 and os.listdir() == [] and sys.argv == ["program.py"]
with open("note.txt", "w") as f: f.write("hello")
os.mkdir("d"); os.rename("note.txt", "d/n"); assert open("d/n").read() == "hello"
folder = tempfile.mkdtemp(); open(folder + "/a", "w").close(); shutil.rmtree(folder)
asyncio.run(asyncio.sleep(0))
@dataclasses.dataclass
class Point:
    x: "int" = 1
assert typing.get_type_hints(Point) == {"x": int} and __name__ == "__main__"
import numpy
assert int(numpy.arange(4).sum()) == 6
print(os.getcwd())
"""
    got = run(source)
    assert got.ok and not got.refused, got.stderr
    assert not os.path.exists(got.stdout.strip())  # the scratch folder is gone


def test_processes_within_limits_are_allowed_in_a_namespace():
    source = """
import multiprocessing as m
def square(x): return x * x
with m.get_context("fork").Pool(2) as p: assert p.map(square, [1, 2, 3]) == [1, 4, 9]
"""
    with open_pool() as opened:
        got = opened.run(source, 20.0, 512)
    assert got.ok, got.stderr


def test_random_numbers_differ_between_programs(run):
    assert run("import random; print(random.random())").stdout != run("import random; print(random.random())").stdout


def test_the_environment_is_bare(run, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SECRET", "x")
    got = run("import os; print(sorted(os.environ))")
    assert got.ok and "NANOCHAT_SECRET" not in got.stdout and "PATH" in got.stdout


def test_text_that_is_not_ascii_and_not_utf8(run):
    got = run("print('é', flush=True)\nimport sys; sys.stdout.buffer.write(bytes([255]))")
    assert got.ok and got.stdout == "é\n\ufffd"


def test_works_from_several_threads_beside_jax_and_leaves_nothing_open():
    import jax.numpy as jnp

    assert jnp.arange(3).sum() == 3  # its runtime has started threads
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    results = []
    threads = [threading.Thread(target=lambda i=i: results.append(run_on(i))) for i in range(12)]
    with pool.Pool(log=lambda line: None) as opened:

        def run_on(i: int) -> tuple[int, Result]:
            time.sleep(0.01 * (i % 5))
            return i, opened.run(f"open('x', 'x').write('{i}')\nprint(open('x').read())", 20.0, 512)

        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(results) == 12 and all(r.ok and r.stdout == f"{i}\n" for i, r in results)
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_run_program_takes_a_pool_of_its_own():
    assert run_program("print(1)").stdout == "1\n"


def test_a_sandbox_that_fails_is_no_verdict(capfd):
    """A program that was never behind its limits has neither passed nor failed."""
    with pool.Pool(log=lambda line: None) as opened:
        with pytest.raises(RuntimeError, match="ended without an answer"):
            opened.run("print(1)", 20.0, memory_mb=2**60)  # a limit that no kernel takes
        assert "could not start a program" in capfd.readouterr().err
        assert opened.run("print(1)", 20.0, 512).ok


# --------------------------------------------------------------------------------------------- without namespaces


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.kill(os.getppid(), 0)",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import shutil; shutil.rmtree(OUTSIDE)",
        "import os; os.remove(OUTSIDE + '/kept')",
        "import os; os.rename('/etc/hostname', 'mine')",
        "import pathlib; pathlib.Path(OUTSIDE, 'new').write_text('x')",
        "open(OUTSIDE + '/kept', 'w')",
        "import os; os.chdir(OUTSIDE); open('kept', 'a')",
        "import os; os.symlink(OUTSIDE, 'inside'); open('inside/kept', 'w')",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_harm_by_accident_is_refused(run_without_namespaces, tmp_path, source):
    (tmp_path / "kept").write_text("kept")
    got = run_without_namespaces(f"OUTSIDE = {str(tmp_path)!r}\n{source}")
    assert got.outcome in (Outcome.CALL_REFUSED, Outcome.FILE_REFUSED, Outcome.NETWORK_REFUSED), str(got)
    assert ("socket" in source) == (got.outcome is Outcome.NETWORK_REFUSED)
    assert ("OUTSIDE" in source or "/etc" in source) == (got.outcome is Outcome.FILE_REFUSED)
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept").read_text() == "kept"


def test_ctypes_counts_as_not_installed(run_without_namespaces):
    source = "try:\n    import ctypes\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit(1)"
    assert run_without_namespaces(source).ok


def test_calls_that_get_past_the_hook_are_still_refused():
    """An extension that asks the kernel itself: here a function that raises no audit event."""
    with open_pool("seccomp only") as opened:
        got = opened.run("import os; os.memfd_create('x')", 20.0, 512)
    assert got.outcome is Outcome.CALL_REFUSED and got.refused == ("memfd_create",)


def test_scratch_folders_are_made_where_temporary_files_go_and_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_pool("neither") as opened:
        got = opened.run("import os; print(os.getcwd()); open('a', 'w'); os.mkdir('b')", 20.0, 512)
        assert got.stdout.startswith(str(tmp_path)) and os.listdir(tmp_path) == []
        assert len(processes_with(str(tmp_path))) == 1  # the worker
    assert processes_with(str(tmp_path)) == {}


# ----------------------------------------------------------------------------------------------------- policy


def test_what_is_missing_is_said_once():
    lines = []
    with pool.Pool(without=("namespaces", "seccomp"), log=lines.append) as opened:
        threads = [threading.Thread(target=opened.run, args=("pass", 20.0, 512)) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    (line,) = lines
    assert "namespaces" in line and "seccomp" in line and "\n" not in line


@pytest.mark.parametrize("mode", WITHOUT_NAMESPACES)
def test_required_refuses_to_run_without_isolation(mode):
    with pool.Pool("required", without=MODES[mode]) as opened:
        for attempt in (opened.prepare, lambda: opened.run("print(1)", 5.0, 512)):
            with pytest.raises(UserError, match="evals.sandbox=required.*namespaces.*evals.sandbox=auto") as e:
                attempt()
            assert "\n" not in str(e.value)
