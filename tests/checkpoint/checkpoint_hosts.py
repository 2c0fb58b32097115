"""What each of the two processes of test_checkpoint_hosts.py does: it prints what it found as one JSON line.

python checkpoint_hosts.py DIR PORT RANK
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from nanochat_jax.checkpoint import Checkpointer, Damaged, saved_steps, store
from nanochat_jax.config import CheckpointConfig, MeshConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts, sharding
from nanochat_jax.mesh.preemption import Stop


def state_of(step: int) -> dict:
    """The same NumPy arrays in every process."""
    rng = np.random.default_rng(step)
    weights = {
        "wte": {"embedding": rng.normal(size=(64, 32)).astype(np.float32)},
        "blocks": [{"attn": {"q": {"weight": rng.normal(size=(32, 32)).astype(np.float32)}}}],
    }
    return {
        "params": weights,
        "opt_state": {"wte": {"embedding": rng.normal(size=(64, 32)).astype(ml_dtypes.bfloat16)}},
        "step": np.int32(step),
    }


def place(state, mesh):
    def put(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))

    return jax.tree.map(put, state, sharding.tree_shardings(state, mesh))


def same(got, state) -> bool:
    """Whether what this process holds of `got` is, bit for bit, that part of `state`."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True)
    return all(
        np.asarray(shard.data).tobytes() == np.asarray(x[shard.index]).tobytes() and shard.data.dtype == x.dtype
        for array, x in pairs
        for shard in array.addressable_shards
    )


def restored(directory: Path, mesh) -> list:
    """[step, whether the state is that step's, what was said]"""
    said: list[str] = []
    checkpointer = Checkpointer(directory, say=said.append)
    state, meta = checkpointer.restore(sharding.abstract(state_of(0), mesh))
    checkpointer.close()
    return [meta["step"], same(state, state_of(meta["step"])), said]


def refused(directory: Path) -> str:
    try:
        Checkpointer(directory)
    except UserError as e:
        return str(e)


def signalled(rank: int) -> dict:
    """At which step each sees SIGUSR1, which process 1 alone gets, and what process 0 alone said to be due."""
    due_at = []
    with Stop() as stop:
        for step in range(100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            stop_now, due = stop.agreed(rank == 0 and step == 2)
            due_at += [step] * due
            if stop_now:
                return {"stopped": step, "due": due_at, "why": stop.why}
            time.sleep(0.002 * rank)


def saved_by_time(directory: Path, rank: int, mesh) -> list[int]:
    """Steps that were saved because time had passed."""
    checkpointer, stop, steps = Checkpointer(directory, CheckpointConfig(save_minutes=0.2 / 60, keep=100)), Stop(), []
    for step in range(1, 40):
        time.sleep(0.02 + 0.005 * rank)
        _, due = stop.agreed(checkpointer.due())
        if due:
            checkpointer.save(step, place({"step": np.int32(step)}, mesh), {})
            steps.append(step)
    checkpointer.close()
    return steps


def main(folder: Path, port: str, rank: int) -> dict:
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    hosts.start({**address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(rank)})
    first, second = (sharding.make_mesh(c) for c in (MeshConfig(1, 4, 2), MeshConfig(4, 1, 2)))
    out = {"devices": [jax.device_count(), jax.local_device_count()]}
    checkpointer = Checkpointer(folder / "two")
    out["empty"] = checkpointer.latest()
    for step in (1, 2, 3):
        checkpointer.save(step, place(state_of(step), first), {"step": step})
    checkpointer.close()
    out["saved"] = saved_steps(folder / "two")
    out["two"] = [restored(folder / "two", mesh) for mesh in (first, second)]
    out["one"] = [restored(folder / "one", mesh) for mesh in (first, second)]
    out["damaged"] = restored(folder / "damaged", first)
    read = store._read_arrays

    def fails_here(path, abstract):
        if rank == 1 and path.name == "3":
            raise Damaged("a disk that only this host sees so")
        return read(path, abstract)

    store._read_arrays = fails_here
    out["unreadable on one host"] = restored(folder / "unreadable", first)
    store._read_arrays = read
    out["held"] = refused(folder / "held")
    out["no folder"] = refused(folder / "file" / "checkpoints")
    out["signals"] = signalled(rank)
    out["by time"] = saved_by_time(folder / "timed", rank, first), saved_steps(folder / "timed")
    hosts.stop()
    return out


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(json.dumps(found))
