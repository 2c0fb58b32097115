"""Which of several processes this one is: from three variables, or from those of SLURM, Open MPI and Kubernetes.

jax's own detection (jax/_src/clusters) counts the tasks of a SLURM job where those of the step are meant (and so hangs
in an interactive shell), gives every process one GPU, does not know Open MPI 5, and asks Kubernetes' API for what a
manifest can say. So the launchers' variables are read here.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_NOT_SRUN = 0xFFFFFFF0  # SLURM's step numbers from here on: the batch script, an interactive shell, what came by ssh


@dataclass(frozen=True)
class Cluster:
    how: str  # the source: variables, slurm, open mpi
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

    The three variables come before a launcher; JAX_NUM_PROCESSES=1 alone turns a launcher off. Beside a launcher
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
    if found.process >= found.processes:
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
    """The three variables; an indexed Job of Kubernetes sets the third one itself."""
    if environ.get(COUNT) == "1" and not environ.get(ADDRESS):
        return None
    index = INDEX if environ.get(INDEX) else "JOB_COMPLETION_INDEX"
    missing = [n for n in (ADDRESS, COUNT) if not environ.get(n)] + ([] if environ.get(index) else [INDEX])
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too: of {ADDRESS}, {COUNT}, {INDEX} set all, or none")
    return Cluster("variables", environ[ADDRESS], _number(environ, COUNT), _number(environ, index))


def _launched(
    environ: Mapping[str, str], how: str, host: str, job: str, processes: int, process: int, local: int | None
):
    """A launcher's process. The job's name decides the port: above Linux's ephemeral ports, with the next one free.

    local: this process's number among several on its host, and so its device, unless the launcher hid the others.
    """
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + 2 * (zlib.crc32(job.encode()) % 2047)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = None if local is None or (visible and "," not in visible) else (local,)
    return Cluster(how, environ.get(ADDRESS) or f"{host}:{port}", processes, process, devices)


def first_host(nodes: str) -> str:
    """The first name in a list of SLURM's, such as gpu[003-007,12],cpu2 or rack[1-2]-n[01-04]."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A task of `srun`. SLURM_NTASKS is the job's, in the batch script's own shell and in salloc's too; the step's
    own number is what counts, and those shells have none or 1."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(not environ.get(n) for n in names) or _number(environ, "SLURM_STEP_ID", 0) >= _NOT_SRUN:
        return None
    host, job = first_host(environ["SLURM_STEP_NODELIST"]), environ["SLURM_JOB_ID"]
    tasks, process = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    several = tasks > _number(environ, "SLURM_STEP_NUM_NODES", 1)
    local = _number(environ, "SLURM_LOCALID") if several else None
    return _launched(environ, "slurm", host, f"{job}.{environ.get('SLURM_STEP_ID', 0)}", tasks, process, local)


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """A process of `mpirun`, from the host that mpirun was called on. Versions up to 4 name that host's addresses in
    OMPI_MCA_orte_hnp_uri (1531576320.0;tcp://10.96.0.1,10.148.0.1:34911), version 5 its name in PMIX_NAMESPACE
    (prterun-gpu01-1234@1)."""
    if not environ.get("OMPI_COMM_WORLD_SIZE"):
        return None
    size, here = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    uri, space = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri) or re.search(r"^prterun-(.+)-\d+@\d+$", space)
    host = "127.0.0.1" if size == here else next(filter(None, launcher.groups())) if launcher else ""
    if not host and size > 1 and not environ.get(ADDRESS):
        raise UserError(f"mpirun names no host; give it -x {ADDRESS}=HOST:61440, with the first host's name")
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") if here > 1 else None
    process, host = _number(environ, "OMPI_COMM_WORLD_RANK"), f"[{host}]" if ":" in host else host
    return _launched(environ, "open mpi", host, uri.split(".")[0] or space, size, process, local)
