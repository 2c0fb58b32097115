"""Several hosts as one run: they meet, wait for each other, and end together.

    with hosts.together():
        ...                      # jax.process_index(), jax.process_count(), collectives over all devices

On one process all of this does nothing and imports nothing. Several are found by `cluster.detect`: under SLURM, Open
MPI and Kubernetes by themselves (configs/cluster/), or by three variables. When one of them dies the others say which
within half a minute, as their last line, and exit with 75: the same command resumes from the last checkpoint.
"""

import atexit
import ctypes
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nanochat_jax.errors import START_AGAIN, UserError
from nanochat_jax.mesh.cluster import Cluster, detect
from nanochat_jax.mesh.peers import LEAVING, Watch

HEARTBEAT = 100  # seconds until jax takes a process for dead: only for one that hangs, the watch is faster for the rest
PATIENCE = 35.0  # seconds until a failed collective counts as this process's own error: longer than the watch needs
START = 300.0  # seconds that all have to meet in
FAREWELL = 120.0  # seconds that all have to leave in when they were asked to stop

_watch: Watch | None = None


def start(environ: Mapping[str, str] = os.environ, say: Callable[[str], None] | None = None) -> None:
    """Joins the others, where there are any, before jax is used; `say` gets one line about it.

    UserError where the environment contradicts itself, or where not all have met in time.
    """
    global _watch
    cluster = detect(environ)
    if cluster is None:
        return
    _watch = Watch(cluster, START)
    try:
        _join_jax(cluster)
    except Exception as e:
        stop(e)
        raise UserError(f"jax.distributed did not start at {cluster.coordinator}: {e}") from e
    if say:
        say(f"{_watch.who(cluster.process)} of {cluster.processes}, at {cluster.coordinator} ({cluster.how})")


def _join_jax(cluster: Cluster) -> None:
    import jax

    # preemption.Stop is ours: jax's own would swallow SIGTERM and stop at a step of its choice
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would send what goes to the coordinator through a proxy that is meant for the internet
    jax.config.update("jax_check_proxy_envs", False)
    past = "no_grpc_proxy"  # gRPC reads it in lower case
    os.environ[past] = ",".join(filter(None, [os.environ.get(past), cluster.host]))
    _sleep_before_aborting()
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        local_device_ids=cluster.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(START),
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=60,
    )


def _sleep_before_aborting() -> None:
    """When jax or NCCL miss another process they abort this one, with a C++ message that names nobody, often before the
    watch's thread has run. So the aborting thread sleeps first: as many seconds as SIGABRT's number, 6. The handler is
    libc's own `sleep`, which a signal may always call; Python's would only run later."""
    if os.name == "posix":
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _silence_cpp() -> None:
    """Discards what C++ writes to stderr and keeps Python's: gRPC's complaint that the others are gone, which they are
    at this process's word, would come after the line that says why."""
    sys.stderr.flush()
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _exit_at_once(code: int) -> None:
    """Instead of Python's and jax's own cleanup, which waits for collectives and for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def stop(error: BaseException | None = None, orderly: bool = False) -> None:
    """Leaves the others. Without an error, when all have reached this point.

    With an `error` the others end at once and say whose it was, and what; but where it only follows from another's
    death this process ends as they do, and `stop` never returns. An `orderly` one is every process's, which have all
    been asked to stop and have saved.
    """
    global _watch
    watch, jax = _watch, sys.modules.get("jax")
    if watch is None:
        return
    if error is not None and not orderly:
        if jax and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(PATIENCE)  # a collective may fail because another process died: then the watch ends this one
        _silence_cpp()
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        watch.tell(f"{watch.who(watch.me)} stopped: {text}", code)
        atexit.register(_exit_at_once, code)  # registered last, so run first, after a traceback has been printed
    else:
        farewell = (f"stopped: {error}", START_AGAIN) if error is not None else ("has finished, and others have not", 1)
        try:
            watch.meet(LEAVING, farewell, FAREWELL if error is not None else None)
        except queue.Empty:
            watch.end(f"{watch.who(watch.me)} {farewell[0]}; the others did not within {FAREWELL:.0f} s", START_AGAIN)
        if jax:
            jax.distributed.shutdown()
    watch.close()
    _watch = None


@contextmanager
def together(
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] | None = None,
    orderly: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """`start`, and `stop` with what became of the block; `orderly` are the exceptions that every process raises."""
    start(environ, say)
    try:
        yield
    except BaseException as e:
        stop(e, isinstance(e, orderly))
        raise
    stop()


def log_to(write: Callable[[str], None]) -> None:
    """Where the last line goes beside stderr when another host ends this run, such as RunLog.write."""
    if _watch:
        _watch.log = write


def index() -> int:
    """This process's number, from 0. It does not start jax's devices, as jax.process_index() does."""
    return _watch.me if _watch else 0


def count() -> int:
    return _watch.count if _watch else 1


def is_main() -> bool:
    """Whether this is the process that writes logs and files, and does what is done once."""
    return index() == 0


def gather(name: str, value=None) -> list:
    """The small JSON values of all processes, in order, when all are here: it waits, for hours if need be, without a
    device or a busy core.

    All must call it with the same names in the same order; where they do not, all end and say who waited where.
    """
    return _watch.meet(name, value) if _watch else [value]


def barrier(name: str) -> None:
    gather(name)


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Process 0 runs the block, then the others: what it leaves in a shared folder they find."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)
