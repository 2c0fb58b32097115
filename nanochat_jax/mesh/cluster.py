"""Which of several processes this one is: by three variables, or by what SLURM, Open MPI and Kubernetes set.

    JAX_COORDINATOR_ADDRESS=10.0.0.7:61440 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 uv run run_speedrun.py ...

jax reads the first of the three by itself; its own detection counts the tasks of a SLURM job where those of the step
are meant (and so hangs in an interactive shell), gives every process one GPU, and asks Kubernetes' API for what a
manifest can say (jax/_src/clusters). So the launchers' variables are read here and nothing is left to guess.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_NOT_SRUN = 0xFFFFFFF0  # SLURM's step numbers from here on: the batch script, an interactive shell, what came by ssh


@dataclass(frozen=True)
class Cluster:
    """One process among several."""

    how: str  # who said so: variables, slurm, open mpi
    coordinator: str  # host:port of process 0; the port after it is the watch's
    processes: int
    process: int  # 0 to processes - 1
    devices: tuple[int, ...] | None = None  # the devices of its host that it takes; None: all

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """What the environment says; None for a process on its own. UserError where it contradicts itself.

    The three variables come before a launcher; JAX_NUM_PROCESSES=1 alone sends a launcher away. Beside a launcher
    JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, as jax has them, correct the address alone.
    """
    if environ.get(COUNT) or environ.get(INDEX):
        found = _variables(environ)
    else:
        found = _open_mpi(environ) or _slurm(environ)  # mpirun inside a SLURM job sets both: it is the nearer one
        if environ.get(ADDRESS) and not found:
            raise UserError(f"{ADDRESS} is set, but {COUNT} and {INDEX} are not; set all three, or none")
        if not found and _number(environ, "JOB_COMPLETION_INDEX", 0) > 0:
            raise UserError(
                f"this is not the first pod of an indexed Job, and nothing says how many there are; set {ADDRESS} and "
                f"{COUNT} as configs/cluster/jobset.yaml does, or {COUNT}=1 for pods that run on their own"
            )
    if found is None or found.processes == 1:
        return None
    if not 0 <= found.process < found.processes:
        raise UserError(
            f"process {found.process} of {found.processes} ({found.how}): they are counted from 0 to "
            f"{found.processes - 1}; set {INDEX} and {COUNT} to fit"
        )
    if not re.fullmatch(r".+:\d{1,5}", found.coordinator) or not 0 < found.port < 65535:
        raise UserError(
            f"the coordinator's address {found.coordinator!r} is not HOST:PORT with a port from 1 to 65534 (the next "
            f"one is used too); set {ADDRESS}"
        )
    return found


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name}={text} is not a number; it is counted from 0" if text else f"{name} is not set")
    return int(text)


def _variables(environ: Mapping[str, str]) -> Cluster | None:
    """The three variables; an indexed Job of Kubernetes says the third one itself."""
    if environ.get(COUNT) == "1" and not environ.get(ADDRESS):
        return None
    index = INDEX if environ.get(INDEX) else "JOB_COMPLETION_INDEX"
    missing = [n for n in (ADDRESS, COUNT) if not environ.get(n)] + ([] if environ.get(index) else [INDEX])
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too: of {ADDRESS}, {COUNT}, {INDEX} set all, or none")
    return Cluster("variables", environ[ADDRESS], _number(environ, COUNT), _number(environ, index))


def _address(environ: Mapping[str, str], host: str, job: str) -> str:
    """Process 0's address, with a port that the job's name decides: above what Linux lends out, and one kept free."""
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + 2 * (zlib.crc32(job.encode()) % 2047)
    return environ.get(ADDRESS) or f"{host}:{port}"


def _device(environ: Mapping[str, str], local: int) -> tuple[int, ...] | None:
    """Of several processes on a host each takes the device of its own number, unless the launcher hid the others."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if visible and "," not in visible else (local,)


def first_host(nodes: str) -> str:
    """The first name in a list of SLURM's, such as gpu[003-007,12],cpu2 or rack[1-2]-n[01-04]."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A task of `srun`. SLURM_NTASKS is the job's, in the batch script's own shell and in salloc's too; the step's
    own number is what counts, and those shells have none or 1."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(not environ.get(n) for n in names) or _number(environ, "SLURM_STEP_ID", 0) >= _NOT_SRUN:
        return None
    tasks, hosts = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_STEP_NUM_NODES", 1)
    address = _address(
        environ,
        first_host(environ["SLURM_STEP_NODELIST"]),
        f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', 0)}",
    )
    several = tasks > hosts
    devices = _device(environ, _number(environ, "SLURM_LOCALID")) if several else None
    return Cluster("slurm", address, tasks, _number(environ, "SLURM_PROCID"), devices)


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """A process of `mpirun`, from the host that mpirun was called on. Versions up to 4 name that host's addresses in
    OMPI_MCA_orte_hnp_uri (1531576320.0;tcp://10.96.0.1,10.148.0.1:34911), version 5 its name in PMIX_NAMESPACE
    (prterun-gpu01-1234@1)."""
    if not environ.get("OMPI_COMM_WORLD_SIZE"):
        return None
    size, here = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    uri, space = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri) or re.search(r"^prterun-(.+)-\d+@\d+$", space)
    host = next((g for g in launcher.groups() if g), None) if launcher else None
    if size == here:
        host = "127.0.0.1"
    if host is None and size > 1 and not environ.get(ADDRESS):
        raise UserError(f"mpirun names no host; give it -x {ADDRESS}=HOST:61440, with the first host's name")
    if host and ":" in host:
        host = f"[{host}]"
    address = _address(environ, host or "", uri.split(".")[0] or space)
    devices = _device(environ, _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")) if here > 1 else None
    return Cluster("open mpi", address, size, _number(environ, "OMPI_COMM_WORLD_RANK"), devices)
