"""How commands end: what a person can mend is one line on stderr and an exit status, a defect keeps its traceback."""

import errno
import importlib
import io
import os
import subprocess
import sys
import traceback

import numpy as np
import pytest

from conftest import ROOT, speedrun_environment
from nanochat_jax.checkpoint import Damaged, store
from nanochat_jax.cli import command, explained
from nanochat_jax.data.packed import PackedDataset, write_packed
from nanochat_jax.devices import use_compilation_cache
from nanochat_jax.errors import Interrupted, UserError
from nanochat_jax.formats import unreadable

CUDA = "Unable to initialize backend 'cuda': no GPU is there\nand more"


def system_error(number: int, path: str | None = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), path)


def ends(capsys, error: BaseException, argv=(), **options) -> tuple[int, str]:
    """(exit status, the one line on stderr) of a command that raises `error`."""

    @command(**options)
    def main(argv=None):
        raise error() if callable(error) else error

    status = main(list(argv))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return status, err.strip()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("model.dept is\nunknown"), 2, "error: model.dept is unknown"),
        (Interrupted("SIGTERM: saved at step 5"), 75, "interrupted: SIGTERM: saved at step 5"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FloatingPointError("the loss is nan at step 3"), 1, "error: the loss is nan at step 3"),
        (system_error(errno.ENOSPC), 2, "cannot write /data/x: the disk is full; make room"),
        (system_error(errno.EDQUOT), 2, "cannot write /data/x: the disk is full; make room"),
        (system_error(errno.ENOSPC, None), 2, "cannot write: the disk is full; make room"),
        (ValueError("FAILED: write: No space left on device [in zarr]"), 2, "cannot write: the disk is full"),
        (RuntimeError("tensorstore: Read-only file system"), 2, "cannot open or write (Read-only file system)"),
        (system_error(errno.EROFS), 2, "cannot open or write /data/x (Read-only file system); take another folder"),
        (system_error(errno.EACCES), 2, "cannot open or write /data/x (Permission denied); take another folder"),
        (system_error(errno.ENOTDIR), 2, "cannot open or write /data/x (Not a directory); take another path"),
        (system_error(errno.EIO), 2, "cannot read or write /data/x (Input/output error); mend that"),
        (ValueError("tensorstore: Too many open files"), 2, "cannot read or write (Too many open files)"),
        ("\udcfc".encode, 2, "'\\udcfc' cannot be written in utf-8; set PYTHONUTF8=1, or rename"),
        (system_error(errno.EISDIR), 2, "cannot open or write /data/x (Is a directory); take another path"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_line_and_a_status(capsys, error, status, says):
    got, line = ends(capsys, error)
    assert got == status and says in line and line.startswith(("error: ", "interrupted"))


def test_ctrl_c_says_where_the_command_resumes(capsys):
    status, line = ends(capsys, KeyboardInterrupt(), resumes="from the last checkpoint")
    assert (status, line) == (130, "interrupted; the same command resumes from the last checkpoint")


def test_no_device_names_what_asked_for_it(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    status, line = ends(capsys, RuntimeError(CUDA))
    assert status == 2 and "(Unable to initialize backend 'cuda': no GPU is there)" in line
    assert "JAX_PLATFORMS=cuda asks for it, and here is cpu: leave that out" in line
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "set JAX_PLATFORMS=cpu" in ends(capsys, RuntimeError(CUDA))[1]


def test_a_missing_path_is_a_mistake_only_where_a_person_gave_it(capsys):
    for path, argv in (
        ("/no/such", ["--data", "/no/such"]),
        ("/no/such", ["data.dir=/no/such"]),
        ("/proc", ["--out=/proc/x/y"]),  # a folder above it could not be made
        ("/proc/.x.host.12.part", ["--to", "/proc/x"]),  # what becomes it
    ):
        for number in (errno.ENOENT, errno.EEXIST):
            assert "take another path" in ends(capsys, system_error(number, path), argv)[1]
    for argv in ([], ["--run-dir", "/runs/a"], ["--stage", "base"]):
        with pytest.raises(FileNotFoundError):
            ends(capsys, system_error(errno.ENOENT, "/runs/a/base/rows.bin"), argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--run-dir", ""], "an argument is empty"),
        (["--run-dir="], "an argument is empty"),
        (["--run-dir", "runs/\udcfc"], r"'runs/\udcfc' is not text in utf-8; rename it"),
    ],
)
def test_arguments_that_no_command_can_use(capsys, argv, says):
    assert says in ends(capsys, ValueError("not reached"), argv)[1]


@pytest.mark.parametrize("module", ["fcntl", "resource"])
def test_windows(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"needs Linux, macOS or WSL: Python has no module {module}" in ends(capsys, ValueError("not reached"))[1]


def test_the_current_folder_is_gone(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current folder is gone" in ends(capsys, ValueError("not reached"))[1]


def test_what_the_terminal_cannot_say_ends_nothing(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, "ascii"))
    assert command(lambda argv: print(input()))([]) == 0 and out.getvalue() == b"caf?\n"


def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch):
    refused = system_error(errno.EIO)
    for error, raised in (
        (refused, OSError),
        (ValueError("tensorstore: Too many open files"), ValueError),
        (ValueError("checksum"), Damaged),
        (system_error(errno.ENOENT), Damaged),
    ):
        with pytest.raises(raised), store._orbax():
            raise error
    assert str(unreadable("a.parquet", refused)) == "a.parquet cannot be read (Input/output error)"
    assert "put a whole copy in its place" in str(unreadable("a.parquet", OSError("Corrupt snappy")))
    write_packed(tmp_path / "rows", iter([([1, 2],)]), 2, {})
    rows = PackedDataset(tmp_path / "rows")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(np, "load", lambda *a, **k: (_ for _ in ()).throw(refused))
        rows.rows([0])


def test_a_run_that_one_may_only_read(tmp_path, monkeypatch, capsys):
    """Evaluation says so before it begins; who only wants faster starts does without."""
    (tmp_path / "evals").touch()
    monkeypatch.setattr("evals.stage.load_model", lambda *args: None)
    assert importlib.import_module("evals.__main__").main(["--run-dir", str(tmp_path)]) == 2
    assert "evals (File exists)" in capsys.readouterr().err
    use_compilation_cache(tmp_path / "evals" / "compiled")


def test_from_another_folder(tmp_path):
    process = start("-m", "nanochat_jax.checkpoint", "ls", tmp_path, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "no checkpoint in" in one_line(process)


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("INTERNAL"), OSError("?"), KeyError("a")])
def test_a_defect_is_raised_as_it_is(capsys, error):
    with pytest.raises(type(error)) as raised:
        ends(capsys, error)
    assert raised.value is error and explained(error) is None


def test_statuses_of_commands_that_end():
    assert command(lambda argv: None)([]) == 0 and command(lambda argv: 3)([]) == 3


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")])
def test_an_error_of_a_child_process_is_one_line(capsys, number, says):
    try:
        raise system_error(number, "/cache/rows.bin")
    except OSError:
        error = RuntimeError(traceback.format_exc())
    status, line = ends(capsys, error)
    assert status == 2 and "write /cache/rows.bin" in line and says in line


COMMANDS = (
    "run_speedrun nanochat_jax.chat nanochat_jax.export nanochat_jax.import nanochat_jax.scaling "
    "nanochat_jax.planning.experiment nanochat_jax.checkpoint.__main__ nanochat_jax.data.__main__ "
    "nanochat_jax.bench.__main__ evals.__main__ server.__main__ tokenizer.__main__"
)


@pytest.mark.parametrize("name", COMMANDS.split())
def test_every_command_is_guarded(name):
    assert importlib.import_module(name).main.__wrapped__


# ---------------------------------------------------------------------------------------------- for real


def start(*argv, stdout=subprocess.PIPE, cwd=ROOT, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**speedrun_environment(), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(process: subprocess.Popen, status: int = 2) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in err, err
    assert not out and err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose base stage has ended."""
    import jax.numpy as jnp
    import optax

    from nanochat_jax.checkpoint import Checkpointer, write_done
    from nanochat_jax.config import TokenizerConfig, dump_yaml, load_config
    from nanochat_jax.model import scaling
    from nanochat_jax.model.gpt import init_params
    from nanochat_jax.training.loop import TrainState
    from tokenizer import load_tokenizer
    from tokenizer.train import train_tokenizer

    run = tmp_path_factory.mktemp("runs") / "tiny"
    texts = [p.read_text() for p in sorted((ROOT / "nanochat_jax").glob("*.py"))]
    train_tokenizer(iter(texts), run / "tokenizer", TokenizerConfig(vocab_size=512), log=lambda _: None)
    sizes = ["model.depth=2", "model.width=32", "model.head_dim=16", "model.sequence_len=64"]
    config = load_config(None, None, [*sizes, "tokenizer.vocab_size=512"])
    (run / "config.yaml").write_text(dump_yaml(config))
    params = init_params(scaling.gpt_config(config.model, 512), 0)
    keeper = Checkpointer(run / "base" / "checkpoints")
    state = TrainState(params, optax.sgd(1e-3).init(params), jnp.int32(1))
    keeper.save(1, state, {"tokenizer": load_tokenizer(run / "tokenizer").hash, "stage": "base"})
    keeper.close()
    write_done(run / "base", {"seconds": 1.0})
    return run


def test_without_the_device_that_is_asked_for(run_dir):
    missing = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    commands = (
        ["run_speedrun.py", "--run-dir", run_dir.parent / "new"],
        ["-m", "nanochat_jax.chat", "--run-dir", run_dir, "-p", "Hello"],
        ["-m", "evals", "--run-dir", run_dir],
        ["-m", "server", "--run-dir", run_dir, "--port", "0"],
    )
    for process in [start(*argv, **missing) for argv in commands]:
        assert "JAX_PLATFORMS=cuda asks for it" in one_line(process)


def test_paths_that_cannot_be(run_dir, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(p.read_text() for p in sorted((ROOT / "nanochat_jax").glob("*.py"))))
    export = ["-m", "nanochat_jax.export", "--run-dir", run_dir, "--to"]
    train = ["-m", "tokenizer", "train", "--vocab-size", "512", "--data"]
    for argv, says in (
        ([*export, text / "x"], "a.txt (File exists)"),
        ([*export, text / "x" / "y"], "x (Not a directory)"),
        ([*train, text, "--out", "/proc/x"], "/proc/x (No such file or directory)"),
        ([*train, text, "--out", text], "a.txt (File exists)"),
        ([*train, tmp_path / "none.txt", "--out", tmp_path / "x"], "none.txt"),
    ):
        assert says in one_line(start(*argv))


def test_nobody_reads_on():
    """As with `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        process = start("run_speedrun.py", "--settings", stdout=nobody)
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_stdout_on_a_full_disk():
    with open("/dev/full", "w") as full:
        assert "the disk is full" in one_line(start("run_speedrun.py", "--settings", stdout=full))
