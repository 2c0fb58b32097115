"""Several hosts: who is found to be one of them, how they end together, and what configs/cluster gives to launchers."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts
from nanochat_jax.mesh.cluster import Cluster, detect, first_host
from nanochat_jax.mesh.peers import Watch, _Link

HOST = socket.gethostname()
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
THREE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.7:61440", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


# ------------------------------------------------------------------------------------------------------- detection


def test_a_process_alone():
    assert detect({"PATH": "/bin", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) is None
    hosts.start({})
    assert hosts.is_main() and hosts.count() == 1
    assert hosts.gather("x", 3) == [3]
    hosts.barrier("x")
    hosts.stop(ValueError("nobody to tell"))


def test_three_variables():
    assert detect(THREE) == Cluster("variables", "10.0.0.7:61440", 2, 1)
    assert detect({**SLURM, **MPI, **THREE}) == detect(THREE)
    assert detect({**SLURM, "JAX_NUM_PROCESSES": "1"}) is None
    pod = {k: v for k, v in THREE.items() if k != "JAX_PROCESS_ID"}
    assert detect({**pod, "JOB_COMPLETION_INDEX": "1"}) == detect(THREE)
    assert detect({**THREE, "JAX_COORDINATOR_ADDRESS": "[fd00::7]:1234"}).host == "fd00::7"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({k: v for k, v in THREE.items() if k != "JAX_COORDINATOR_ADDRESS"}, "JAX_COORDINATOR_ADDRESS must be set"),
        ({k: v for k, v in THREE.items() if k != "JAX_NUM_PROCESSES"}, "JAX_NUM_PROCESSES must be set"),
        ({k: v for k, v in THREE.items() if k != "JAX_PROCESS_ID"}, "JAX_PROCESS_ID must be set"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.7:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not"),
        ({**THREE, "JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        ({**THREE, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 is not a number"),
        ({**THREE, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is not a number"),
        ({**THREE, "JAX_COORDINATOR_ADDRESS": "10.0.0.7"}, "HOST:PORT"),
        ({**THREE, "JAX_COORDINATOR_ADDRESS": "10.0.0.7:65535"}, "65534"),
        ({"JOB_COMPLETION_INDEX": "1"}, "not the first pod"),
        ({**SLURM, "SLURM_PROCID": "one"}, "SLURM_PROCID=one is not"),
        (MPI, "mpirun names no host"),
    ],
)
def test_variables_that_contradict_are_errors(environ, said):
    with pytest.raises(UserError, match=re.escape(said)):
        detect(environ)


def test_slurm():
    found = detect(SLURM)
    assert (found.how, found.host, found.processes, found.process, found.devices) == ("slurm", "gpu007", 2, 1, None)
    assert 61440 <= found.port < 65535 and found.port % 2 == 0
    assert detect({**SLURM, "SLURM_STEP_ID": "1"}).port != found.port
    assert detect({**SLURM, "JAX_COORDINATOR_PORT": "5000"}).coordinator == "gpu007:5000"
    assert detect({**SLURM, "JAX_COORDINATOR_ADDRESS": "ib007:5000"}).coordinator == "ib007:5000"
    four = {**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert detect(four).devices == (1,)
    assert detect({**four, "CUDA_VISIBLE_DEVICES": "0"}).devices is None  # srun --gpus-per-task


def test_slurm_without_srun_is_one_process():
    batch = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert detect(batch) is None
    assert detect({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None  # srun -n 1, salloc's shell
    assert detect({**SLURM, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[1-2]-n[01-04].cluster,x", "rack1-n01.cluster"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_open_mpi():
    four = {**MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert (detect(four).host, detect(four).process, detect(four).devices) == ("10.96.0.1", 1, None)
    six = {**MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"}
    assert detect(six).host == "fe80::b9b"
    five = {**MPI, "PMIX_NAMESPACE": "prterun-gpu-01-1234@1"}
    assert detect({**SLURM, **five}).host == "gpu-01"
    assert detect({**five, "PMIX_NAMESPACE": "prterun-gpu-01-1235@1"}).port != detect(five).port
    here = {**five, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert (detect(here).host, detect(here).devices) == ("127.0.0.1", (1,))
    assert detect({**MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


# --------------------------------------------------------------------------------------------------- configs/cluster


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_slurm_script(tmp_path, code: int, restarts: int = 0):
    """slurm.sh as sbatch would start it, with an srun whose tasks end with `code`; what srun, uv and scontrol saw."""
    seen = tmp_path / "seen"
    fake(tmp_path, "uv", f'echo "uv $*" >> {seen}; env | grep ^SLURM > {tmp_path}/env.$SLURM_PROCID; exit 0')
    each = 'while [ "${1#--}" != "$1" ]; do shift; done; for i in 0 1; do SLURM_PROCID=$i "$@"; done'
    step = " ".join(f"{k}={v}" for k, v in SLURM.items() if "STEP" in k or k == "SLURM_LOCALID")
    fake(tmp_path, "srun", f'echo "srun $*" >> {seen}; export {step}; {each}; exit {code}'.replace("[007", "\\[007"))
    fake(tmp_path, "scontrol", f'echo "scontrol $*" >> {seen}')
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_RESTART_COUNT": str(restarts),
    }
    command = ["bash", str(ROOT / "configs/cluster/slurm.sh"), "--stages", "base"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20)
    assert done.returncode == code, done.stderr
    return environ, seen.read_text().splitlines()


def variables(path: Path) -> dict:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def test_slurm_script_starts_one_process_a_node(tmp_path):
    environ, seen = run_slurm_script(tmp_path, 0)
    assert detect(environ) is None  # the script's own shell
    assert seen[0] == "uv sync --extra gpu" and "--kill-on-bad-exit=0" in seen[1]
    assert len(seen) == 4 and seen[2] == seen[3]
    assert "run_speedrun.py --config configs/d24.yaml --mesh configs/mesh/multi_host.yaml --run-dir runs/d24" in seen[2]
    assert seen[2].endswith("--stages base")
    found = [detect(variables(tmp_path / f"env.{i}")) for i in range(2)]
    assert [f.process for f in found] == [0, 1]
    assert {(f.how, f.host, f.port, f.processes, f.devices) for f in found} == {
        ("slurm", "gpu007", detect(SLURM).port, 2, None)
    }


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(75, 50, True), (137, 2, True), (137, 10, False), (1, 0, False), (2, 0, False)]
)
def test_slurm_script_queues_up_again(tmp_path, code, restarts, again):
    _, seen = run_slurm_script(tmp_path, code, restarts)
    assert ("scontrol requeue 4711" in seen) is again


def test_slurm_options_leave_time_to_save():
    text = (ROOT / "configs/cluster/slurm.sh").read_text()
    options = re.findall(r"^#SBATCH (\S+)$", text, re.M)
    assert "--signal=USR1@120" in options and "--requeue" in options and "--ntasks-per-node=1" in options
    assert text.index("#SBATCH --output") < text.index("MAX_CRASHES=")  # sbatch stops reading at the first command


def test_jobset_gives_every_pod_its_place():
    claim, job = yaml.safe_load_all((ROOT / "configs/cluster/jobset.yaml").read_text())
    spec = job["spec"]
    (replicated,) = spec["replicatedJobs"]
    name, group, number = job["metadata"]["name"], replicated["name"], replicated["replicas"]
    template = replicated["template"]["spec"]
    assert template["completionMode"] == "Indexed" and template["completions"] == template["parallelism"] == 1
    assert spec["coordinator"]["replicatedJob"] == group and spec["network"]["enableDNSHostnames"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    found = []
    for i in range(number):
        annotations = {  # what JobSet's controller writes (api/jobset/v1alpha2/jobset_types.go)
            "jobset.sigs.k8s.io/coordinator": f"{name}-{group}-0-0.{name}",
            "jobset.sigs.k8s.io/replicatedjob-replicas": str(number),
            "jobset.sigs.k8s.io/job-index": str(i),
        }
        environ = {}
        for entry in container["env"]:  # in order: $(NAME) is what stands above, as kubelet has it
            if "valueFrom" in entry:
                path = entry["valueFrom"]["fieldRef"]["fieldPath"]
                value = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]]
            else:
                value = re.sub(r"\$\((\w+)\)", lambda m, e=environ: e.get(m[1], m[0]), entry["value"])
            environ[entry["name"]] = value
        found.append(detect({**environ, "JOB_COMPLETION_INDEX": "0"}))
    assert found == [Cluster("variables", "nanochat-hosts-0-0.nanochat:61440", number, i) for i in range(number)]

    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    (volume,) = [v for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["args"][container["args"].index("--run-dir") + 1].startswith(mounts[volume["name"]] + "/")
    # exit 75 fails the Job for a reason that JobSet starts all of them again for
    rules = template["podFailurePolicy"]["rules"]
    assert {"containerName": container["name"], "operator": "In", "values": [75]} in [
        r.get("onExitCodes") for r in rules
    ]
    assert pod["restartPolicy"] == "Never" and template["backoffLimit"] == 0  # else Kubernetes refuses the policy
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_skypilot_gives_every_node_its_place(tmp_path):
    task = yaml.safe_load((ROOT / "configs/cluster/skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    fake(tmp_path, "uv", f'echo "$*" > {tmp_path}/args; env | grep ^JAX_ > {tmp_path}/env; exit 75')
    for rank in range(2):
        environ = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
            "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
            "SKYPILOT_NODE_RANK": str(rank),
            **{**task["envs"], "SETTINGS": "--stages base"},
        }
        done = subprocess.run(["bash", "-c", task["run"]], env=environ, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (75, "")
        assert detect(variables(tmp_path / "env")) == Cluster("variables", "10.0.0.7:61440", 2, rank)
    args = (tmp_path / "args").read_text().split()
    assert args[:4] == ["run", "--extra", "gpu", "run_speedrun.py"] and args[-2:] == ["--stages", "base"]
    assert any(args[args.index("--run-dir") + 1].startswith(folder) for folder in task["volumes"])
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0


def test_what_the_cluster_files_name_is_there():
    for path in (ROOT / "configs/cluster").iterdir():
        for name in re.findall(r"configs/[\w/.]+\.(?:yaml|sh)\b", path.read_text()):
            assert (ROOT / name).is_file(), (path.name, name)


# -------------------------------------------------------------------------------------------------- coming together


def free_port() -> int:
    """A port that is free together with the one after it."""
    for port in range(20000 + os.getpid() % 10000, 32000, 2):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no free port")


def test_nobody_at_the_address():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"process 0 was not to be reached at 127.0.0.1:\d+.*{address}"):
        Watch(Cluster("variables", address, 2, 1), timeout=0.4)
    with pytest.raises(UserError, match="after 0 s process 1, 2 of 3 had not come"):
        Watch(Cluster("variables", address, 3, 0), timeout=0.4)


def test_a_port_that_is_taken():
    port = free_port()
    with socket.create_server(("", port + 1)), pytest.raises(UserError, match=f"port {port + 1} of {HOST}"):
        Watch(Cluster("variables", f"127.0.0.1:{port}", 2, 0), timeout=1)


def test_strangers_and_doubles_are_turned_away():
    address = f"127.0.0.1:{free_port()}"
    port = int(address.split(":")[1]) + 1
    made = {}

    def come(name, process, count=2):
        try:
            made[name] = Watch(Cluster("variables", address, count, process), timeout=10)
        except UserError as e:
            made[name] = str(e)

    main = threading.Thread(target=come, args=("main", 0))
    main.start()
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port), 1)
            break
        except OSError:
            time.sleep(0.02)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(100) in (b"",)
    for name, process, count in (("other run", 1, 3), ("second main", 5, 2)):
        come(name, process, count)
        assert "came to where 2 meet" in made[name]
    come("other", 1)
    main.join(10)
    try:
        assert made["main"].names == made["other"].names == {0: HOST, 1: HOST}
    finally:
        for watch in (made["main"], made["other"]):
            watch.leaving = True
        made["other"].close()
        made["main"].close()


def test_a_host_that_no_longer_answers_is_a_broken_connection():
    """The kernel then raises TimeoutError in a blocking read, as a socket with a timeout does."""
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_connection(here.getsockname()) as there:
        link = _Link(there)
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            idle, every, times = (there.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in names)
            assert idle + every * times <= 30
        there.settimeout(0.05)
        assert link.receive() is None


# --------------------------------------------------------------------------------------------------- ending together


class Run:
    """Some processes of tests/mesh/hosts_child.py that have come together."""

    def __init__(self, tmp_path, *deeds: str, light=True):
        port = free_port()
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "JAX_NUM"))}
        environ.update(
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(len(deeds)),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            PYTHONPATH=str(ROOT),
        )
        self.out = [tmp_path / f"out.{i}" for i in range(len(deeds))]
        self.err = [tmp_path / f"err.{i}" for i in range(len(deeds))]
        self.processes = []
        for i, name in enumerate(deeds):
            command = [sys.executable, str(ROOT / "tests/mesh/hosts_child.py"), name, *(["light"] if light else [])]
            with open(self.out[i], "wb") as out, open(self.err[i], "wb") as err:
                mine = {**environ, "JAX_PROCESS_ID": str(i)}
                self.processes.append(subprocess.Popen(command, env=mine, stdout=out, stderr=err, cwd=tmp_path))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for p in self.processes:
            p.kill()
            p.wait()

    def wait_until_ready(self):
        until = time.monotonic() + 60
        while not all("ready" in path.read_text() for path in self.out):
            assert time.monotonic() < until, [path.read_text() for path in self.err]
            time.sleep(0.05)
        time.sleep(0.3)

    def kill(self, i: int):
        self.wait_until_ready()
        self.processes[i].send_signal(signal.SIGKILL)

    def codes(self, within: float = 10) -> list[int]:
        until = time.monotonic() + within
        return [p.wait(max(0.1, until - time.monotonic())) for p in self.processes]

    def last_words(self) -> list[str]:
        return [(path.read_text().splitlines() or [""])[-1] for path in self.err]


GONE = f"host {HOST} (process %d) is gone; the run stops here and resumes from its last checkpoint when started again"


@pytest.mark.parametrize("dead", [0, 2])
def test_a_dead_host_ends_the_others_by_name(tmp_path, dead):
    """In jitted sums over six devices of three processes, where jax and gloo have errors of their own to tell."""
    with Run(tmp_path, "forever", "forever", "forever", light=False) as run:
        run.kill(dead)
        begun = time.monotonic()
        codes = run.codes(within=20)
        assert time.monotonic() - begun < 15
        assert codes == [-9 if i == dead else 75 for i in range(3)], [p.read_text() for p in run.err]
        assert [w for i, w in enumerate(run.last_words()) if i != dead] == [GONE % dead] * 2
        if dead:
            assert f"log: {GONE % dead}" in run.out[0].read_text()


@pytest.mark.parametrize(
    ("deeds", "code", "said"),
    [
        (("forever", "error"), 2, ("host %s (process 1) stopped: no such data", "error: no such data")),
        (
            ("crash", "forever"),
            1,
            ("ZeroDivisionError: a mistake", "host %s (process 0) stopped: ZeroDivisionError: a mistake"),
        ),
    ],
)
def test_an_error_ends_collectives(tmp_path, deeds, code, said):
    """At once, also for whoever made it: jax's own tidying up would wait for the others."""
    with Run(tmp_path, *deeds, light=False) as run:
        run.wait_until_ready()
        assert run.codes(within=10) == [code, code]
        assert run.last_words() == [words.replace("%s", HOST) for words in said]


def test_an_orderly_end_is_silent(tmp_path):
    with Run(tmp_path, "finish", "finish", light=False) as run:
        assert run.codes(within=60) == [0, 0], [p.read_text() for p in run.err]
        assert ["sum 4.0" in path.read_text() for path in run.out] == [True, True]
        assert [path.read_text() for path in run.err] == ["", ""]


def test_barriers_and_values(tmp_path):
    with Run(tmp_path, "finish", "finish", "finish") as run:
        assert run.codes() == [0, 0, 0]
        assert [path.read_text() for path in run.err] == ["", "", ""]
        for i, path in enumerate(run.out):
            assert path.read_text().splitlines()[1:] == [f"['from 0', 'from 1', 'from 2'] 3 {i == 0}"]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_breaks_a_barrier(tmp_path, dead):
    """Also where a child of the dead process's still holds what it held open."""
    deeds = ["wait", "wait", "wait"]
    deeds[dead] = "fork"
    with Run(tmp_path, *deeds) as run:
        run.kill(dead)
        assert run.codes(within=15) == [-9 if i == dead else 75 for i in range(3)]
        assert [w for i, w in enumerate(run.last_words()) if i != dead] == [GONE % dead] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_told_by_all(tmp_path, failing):
    deeds = ["wait", "wait", "wait"]
    deeds[failing] = "error"
    with Run(tmp_path, *deeds) as run:
        assert run.codes() == [2, 2, 2]
        words = run.last_words()
        assert words.pop(failing) == "error: no such data"
        assert words == [f"host {HOST} (process {failing}) stopped: no such data"] * 2


def test_who_stops_alone_takes_the_others_along(tmp_path):
    with Run(tmp_path, "stop", "wait") as run:
        assert run.codes() == [75, 75]
        assert run.last_words()[1] == f"host {HOST} (process 0) stopped: saved at step 20"


def test_all_that_stop_together_are_silent(tmp_path):
    with Run(tmp_path, "stop", "stop") as run:
        assert run.codes() == [75, 75]
        assert [path.read_text() for path in run.err] == ["", ""]


def test_processes_that_part_ways_are_told_so(tmp_path):
    with Run(tmp_path, "wait", "wait elsewhere") as run:
        assert run.codes() == [1, 1]
        assert "(process 0) waits at 'tokenizer' and host" in run.last_words()[0]
        assert run.last_words()[0] == run.last_words()[1]
