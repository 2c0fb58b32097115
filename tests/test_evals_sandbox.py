"""run_program against programs that misbehave."""

import os
import threading
import time

import pytest

from evals import sandbox
from evals.sandbox import run_program


def test_a_program_that_runs_to_its_end():
    got = run_program("import math\nprint(math.gcd(12, 18))\n")
    assert got == sandbox.Result(ok=True, stdout="6\n", stderr="", timed_out=False)


@pytest.mark.parametrize(
    ("source", "stderr"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(", "SyntaxError"),
        ("print(os)", "NameError"),  # nothing of the launcher is in sight
        ("input()", "EOFError"),
        ("x = bytearray(2 * 10**9)", "MemoryError"),
        ("x = []\nwhile True: x.append(' ' * 10**6)", "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**8)", "File too large"),
        ("f = [open('/dev/null') for _ in range(200)]", "Too many open files"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_errors_and_limits(source, stderr):
    got = run_program(source)
    assert not got.ok and not got.timed_out and stderr in got.stderr


@pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "exit()", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_success(source):
    got = run_program(f"{source}\nassert False")
    assert not got.ok and not got.timed_out


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import multiprocessing as m\nm.Process(target=print).start()",
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
def test_harm_by_accident_is_refused(tmp_path, source):
    (tmp_path / "kept").write_text("kept")
    got = run_program(f"OUTSIDE = {str(tmp_path)!r}\n{source}")
    assert not got.ok and "PermissionError" in got.stderr
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept").read_text() == "kept"


def test_ctypes_counts_as_not_installed():
    assert run_program("try:\n    import ctypes\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit(1)").ok


def test_an_infinite_loop_is_killed():
    started = time.monotonic()
    got = run_program("while True: pass", timeout=0.6)
    assert not got.ok and got.timed_out and time.monotonic() - started < 3


def test_a_thread_that_never_ends_is_killed():
    got = run_program("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", timeout=0.6)
    assert not got.ok and got.timed_out


def test_huge_output_is_drained_and_cut():
    got = run_program("import sys\nprint('x' * 5_000_000)\nsys.stderr.write('y' * 3_000_000)\n")
    assert got.ok and len(got.stdout) == len(got.stderr) == sandbox.OUTPUT_BYTES
    got = run_program("while True: print('x' * 1000)", timeout=0.6)
    assert got.timed_out and len(got.stdout) == sandbox.OUTPUT_BYTES


def test_ordinary_programs_are_not_hindered():
    source = """
import asyncio, dataclasses, os, random, re, shutil, tempfile, threading, typing
seen = []
threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(16)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(seen) == 16 and os.listdir() == []
with open("note.txt", "w") as f: f.write("hello")
os.mkdir("d"); os.rename("note.txt", "d/n"); assert open("d/n").read() == "hello"
folder = tempfile.mkdtemp(); open(folder + "/a", "w").close(); shutil.rmtree(folder)
asyncio.run(asyncio.sleep(0))
@dataclasses.dataclass
class Point:
    x: "int" = 1
assert typing.get_type_hints(Point) == {"x": int} and __name__ == "__main__"
print(os.getcwd())
"""
    got = run_program(source)
    assert got.ok, got.stderr
    assert not os.path.exists(got.stdout.strip())  # the scratch folder is gone


def test_the_environment_is_bare():
    os.environ["NANOCHAT_SECRET"] = "x"
    try:
        got = run_program("import os; print(sorted(os.environ))")
    finally:
        del os.environ["NANOCHAT_SECRET"]
    assert got.ok and "NANOCHAT_SECRET" not in got.stdout and "PATH" in got.stdout


def test_text_that_is_not_ascii_and_not_utf8():
    got = run_program("print('é', flush=True)\nimport sys; sys.stdout.buffer.write(bytes([255]))")
    assert got.ok and got.stdout == "é\n\ufffd"
    assert not run_program("x = '\ud800'; print(x)").ok  # a lone surrogate is an error of the program, not of ours


def test_works_off_the_main_thread_and_leaves_nothing_open():
    results = []
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    threads = [threading.Thread(target=lambda i=i: results.append(run_program(f"print({i})"))) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(r.stdout for r in results) == [f"{i}\n" for i in range(4)] and all(r.ok for r in results)
    assert before is None or len(os.listdir("/proc/self/fd")) == before
