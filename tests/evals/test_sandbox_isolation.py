"""Isolation: what a program finds inside, what ends with what, and machines that have none."""

import ctypes
import ctypes.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_fakes import ROOT, open_pool, processes_with

import run_speedrun
from evals import sandbox
from evals.sandbox import Outcome, isolation, seccomp
from evals.sandbox.pool import Pool
from evals.tasks.base import read_rows
from evals.tasks.humaneval import HumanEval


@pytest.fixture(scope="module")
def pool():
    with open_pool() as opened:
        yield opened


def run(pool, source, timeout=20.0):
    got = pool.run(textwrap.dedent(source), timeout, 512)
    assert got.ok, (str(got), got.stderr)
    return got


# ------------------------------------------------------------------------------------------------ what is inside


def test_a_program_sees_python_and_an_empty_folder(pool):
    got = run(
        pool,
        """
        import json, os, pathlib, socket
        root = pathlib.Path("/")
        folders = [root, *root.glob("*/"), *root.glob("*/*/"), *pathlib.Path(os.__file__).parents]
        writable = sorted({str(d) for d in folders if os.access(d, os.W_OK)})
        names = {name: sorted(os.listdir(name)) for name in ("/", "/dev", ".")}
        print(json.dumps([names, writable, os.getpid(), os.getuid(), os.getgroups(), socket.gethostname()]))
        """,
    )
    names, writable, pid, uid, groups, host = json.loads(got.stdout)
    of_python = {Path(p).parts[1] for p in (*sys.path, sys.base_prefix) if Path(p).is_absolute()}
    assert set(names["/"]) <= {"dev", "etc", "lib", "lib64", "scratch", "usr"} | of_python
    assert names["/dev"] == ["full", "null", "random", "shm", "urandom", "zero"] and names["."] == []
    assert writable == ["/dev/shm", "/scratch"]  # the one is a link to the other
    assert (pid, uid, host) == (2, isolation.UID, "sandbox") and 0 not in groups


def test_a_program_has_no_capabilities_and_no_descriptors(pool):
    run(
        pool,
        """
        import ctypes, os, stat
        libc = ctypes.CDLL(None)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0 and list(data) == [0] * 6
        held = []
        for fd in range(100):
            try: held.append((fd, stat.S_IFMT(os.fstat(fd).st_mode)))
            except OSError: pass
        assert held == [(0, stat.S_IFCHR)] + [(fd, stat.S_IFIFO) for fd in (1, 2, 3)], held
        try: os.setuid(0)
        except OSError: pass
        else: raise SystemExit("became root")
        """,
    )


def test_a_worker_is_in_namespaces_of_its_own_and_its_programs_are_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_pool() as opened:
        running = threading.Thread(target=opened.run, args=("import time; time.sleep(1)", 20.0, 512))
        running.start()
        _wait(lambda: len(processes_with(str(tmp_path))) == 3)
        worker, init, program = family(processes_with(str(tmp_path)))
        _wait(lambda: "Seccomp:\t2" in Path(f"/proc/{program}/status").read_text())
        for kind in ("user", "mnt", "net", "ipc", "uts", "pid"):
            inside, outside = (os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (program, "self"))
            assert inside != outside
        status = Path(f"/proc/{program}/status").read_text()
        assert status.split("Uid:")[1].split()[:4] == [str(os.geteuid() or 65534)] * 4
        assert "NoNewPrivs:\t1" in status and "CapPrm:\t0000000000000000" in status
        running.join()


def family(pids) -> list[int]:
    """A worker that this process has started, its child, and so on."""
    line = [os.getpid()]
    while found := [pid for pid in pids if _parent(pid) == line[-1]]:
        line += found
    return line[1:]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


def test_programs_do_not_meet(pool):
    """Neither one after the other nor at the same time."""
    run(pool, "open('/scratch/mine', 'w').write('secret'); open('/dev/shm/mine', 'w')")
    first = threading.Thread(target=pool.run, args=("open('mine', 'w'); import time; time.sleep(1)", 5.0, 512))
    first.start()
    while first.is_alive():
        run(pool, "import os; assert os.listdir('/scratch') == [] == os.listdir('/dev/shm')")
        run(
            pool,
            "import os\nfor pid in range(3, 50):\n    try: os.kill(pid, 0)\n    except OSError: pass\n    else: 1/0",
        )
    first.join()


# -------------------------------------------------------------------------------------------------- what ends

_EVALUATOR = """
import sys, tempfile, threading, time
sys.path.insert(0, {root!r})
tempfile.tempdir = {temp!r}
from evals.sandbox.pool import Pool
pool = Pool(without={without!r}, log=lambda line: None)
fork = "import os, time\\nif {fork!r} and os.fork() == 0: os.setsid()\\ntime.sleep(60)"
threading.Thread(target=pool.run, args=(fork, 60.0, 512), daemon=True).start()
print(pool.run("print('ready')", 5.0, 512).stdout, flush=True)
pool.run(fork, 60.0, 512)
"""


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["full", "neither"])
def test_nothing_outlives_the_evaluator(mode, ended_by, tmp_path):
    without = () if mode == "full" else ("namespaces", "seccomp")
    if mode == "full":
        open_pool().close()  # or skip
    source = _EVALUATOR.format(root=str(ROOT), temp=str(tmp_path), without=without, fork=mode == "full")
    evaluator = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert evaluator.stdout.readline() == b"ready\n"
        _wait(lambda: len(processes_with(str(tmp_path))) >= 6)  # two workers, each with init and the program
    finally:
        evaluator.send_signal(ended_by)
        evaluator.wait(60)
    _wait(lambda: not processes_with(str(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_a_worker_that_somebody_kills_is_replaced_and_takes_its_program_along(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    got = []
    with open_pool() as opened:
        source = "import time; time.sleep(1); print(1)"
        asking = threading.Thread(target=lambda: got.append(opened.run(source, 20.0, 512)))
        asking.start()
        _wait(lambda: len(processes_with(str(tmp_path))) == 3)
        worker, init, program = family(processes_with(str(tmp_path)))
        os.kill(worker, signal.SIGKILL)
        _wait(lambda: not {worker, init, program} & set(processes_with(str(tmp_path))))
        asking.join()
    assert got[0].stdout == "1\n"


def _wait(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- where there are none


def test_a_machine_without_user_namespaces_says_so_once_and_required_refuses(tmp_path):
    """For real: in a user namespace in which the kernel allows no further one."""
    source = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from evals import sandbox
from nanochat_jax.errors import UserError
lines = []
sandbox.prepare("auto", lines.append)
assert sandbox.run_program("print(1)").stdout == "1\\n"
assert len(lines) == 1, lines
try:
    sandbox.prepare("required", lines.append)
except UserError as e:
    print(lines[0], e, sep="\\n")
"""
    enter = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    command = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("needs the program unshare, and user namespaces to forbid others in")
    got = subprocess.run([*enter, command, "sh", sys.executable, "-c", source], capture_output=True, text=True)
    said, refused = got.stdout.splitlines()
    assert "without namespaces (unshare: No space left on device)" in said
    assert refused.startswith("evals.sandbox=required, but programs that a model wrote would run without namespaces")


def test_a_run_that_requires_isolation_is_refused_at_its_start(monkeypatch, tmp_path, capsys):
    with Pool(without=("namespaces",)) as without:
        monkeypatch.setattr(sandbox, "_default", without)
        settings = ["--config", str(ROOT / "configs" / "demo.yaml"), "--run-dir", str(tmp_path / "run")]
        assert run_speedrun.main([*settings, "evals.sandbox=required"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: evals.sandbox=required, but") and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- the filter of calls


def decide(program: bytes, number: int, *args: int, arch: int) -> int:
    """What a filter answers: a machine for the few instructions of classic BPF that it is made of."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *[a & (2**64 - 1) for a in (*args, 0, 0, 0, 0, 0, 0)[:6]])
    at = value = 0
    while True:
        code, yes, no, k = struct.unpack_from("HBBI", program, 8 * at)
        at += 1
        if code == 0x06:
            return k
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        else:
            at += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no


@pytest.mark.parametrize("machine", seccomp.MACHINES)
@pytest.mark.parametrize("alone", [None, 77])
def test_the_filter_answers_as_its_lists_say(machine, alone):
    arch, refused, judged, extra = seccomp.MACHINES[machine]
    program, notify, allow = seccomp.build(machine, alone), 0x7FC00000, 0x7FFF0000
    assert len(program) // 8 < 4096  # instructions, of which the kernel takes no more

    def answer(number, *args):
        return decide(program, number, *args, arch=arch)

    assert {answer(n) for n in refused.values()} == {notify}
    assert {answer(n) for n in extra.values()} <= {allow if alone is None else notify}
    named = {*refused.values(), *judged.values(), *extra.values(), 435}
    assert {answer(n) for n in range(463) if n not in named} == {allow}
    assert {answer(n) for n in (435, 463, 1000, 0x40000000 | 1)} == {0x00050000 | 38}  # ENOSYS
    assert decide(program, 0, arch=0x40000003) == 0x80000000  # another architecture's numbers: killed
    assert answer(judged["prlimit64"], 0, 7, 0) == allow and answer(judged["prlimit64"], 0, 7, 1 << 40) == notify
    thread, process = 0x003D0F00, 0x01200011
    assert answer(judged["clone"], thread) == allow
    assert answer(judged["clone"], process) == (allow if alone is None else notify)
    signals = {pid: answer(judged["kill"], pid, 9) for pid in (1, -1, 0, 2, 77)}
    assert answer(judged["tgkill"], 1) == notify and answer(judged["tgkill"], 77) == allow
    if alone is None:
        assert signals == {1: notify, -1: notify, 0: allow, 2: allow, 77: allow}
        assert all(answer(judged["clone"], process | bit) == notify for bit in (1 << 17, 1 << 28, 1 << 30))
    else:
        assert signals == {1: notify, -1: notify, 0: notify, 2: notify, 77: allow}
        assert answer(judged["tgkill"], 78) == notify


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_numbers_of_system_calls_are_those_of_libseccomp(machine):
    path = ctypes.util.find_library("seccomp")
    if not path:
        pytest.skip("needs libseccomp, which knows all numbers")
    arch, refused, judged, extra = seccomp.MACHINES[machine]
    resolve = ctypes.CDLL(path).seccomp_syscall_resolve_name_arch
    ours = refused | judged | extra
    theirs = {name: resolve(arch, name.encode()) for name in ours}
    assert {name: n for name, n in theirs.items() if n not in (ours[name], -1)} == {}  # -1: newer than the library
    assert sum(n == -1 for n in theirs.values()) < 6


# ------------------------------------------------------------------------------------------------- HumanEval


def test_a_verdict_says_what_happened():
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    task = HumanEval([row | {"test": "def check(f):\n    assert f() == 1, 'not one'\n"}])
    assert task.judge(task[0], "def f(): return 1") == (True, "passed")
    assert task.judge(task[0], "def f(): return 2") == (False, "failed: AssertionError: not one")
    right, reason = task.judge(task[0], "open('/etc/passwd', 'a')")
    assert not right and reason.startswith(Outcome.FILE_REFUSED)


def test_every_canonical_solution_of_humaneval_passes():
    folder = os.environ.get("NANOCHAT_DATA")
    path = Path(folder or "", "tasks", "humaneval_test.parquet")
    if not folder or not path.is_file():
        pytest.skip("needs NANOCHAT_DATA, a folder with tasks/humaneval_test.parquet")
    task = HumanEval(read_rows(path))
    rows = [task[i] for i in range(len(task))]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        verdicts = list(threads.map(lambda row: task.judge(row, row["messages"][-1]["content"]), rows))
    assert verdicts == [(True, "passed")] * 164
