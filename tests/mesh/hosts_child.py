"""One process of a run on several hosts, as test_hosts.py starts them: hosts_child.py DEED [light].

`light` leaves jax out: what is tested then is the watch alone.
"""

import os
import sys
import time

from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts


class Stopped(Exception):
    """What every process raises when all have been asked to stop."""


def reduce_forever(steps: int | None = None) -> float:
    """A jitted sum over all devices of all processes, again and again."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=split)()
    total = jax.jit(jnp.sum, out_shardings=whole)
    value, step = float(total(ones)), 0
    print("ready", flush=True)
    while steps is None or step < steps:
        value, step = float(total(ones)), step + 1
    return value


def deed(name: str, light: bool) -> None:
    if not light:
        print(f"sum {reduce_forever(None if name == 'forever' else 20)}", flush=True)
        if name == "error":
            raise UserError("no such data")
        if name == "crash":
            raise ZeroDivisionError("a mistake")
        return
    print("ready", flush=True)
    if name == "finish":
        print(hosts.gather("greeting", f"from {hosts.index()}"), hosts.count(), hosts.is_main(), flush=True)
        time.sleep(0.2 * hosts.index())
        hosts.barrier("tokenizer")
    elif name == "wait":
        hosts.barrier("tokenizer")
    elif name == "wait elsewhere":
        hosts.barrier("evaluation")
    elif name == "error":
        raise UserError("no such data")
    elif name == "stop":
        raise Stopped("saved at step 20")
    elif name == "fork" and os.fork() == 0:  # such as a worker that packs rows
        time.sleep(20)
        os._exit(0)
    else:
        time.sleep(60)


def main(name: str, light: bool) -> int:
    if light:
        hosts._join_jax = lambda cluster: None
    try:
        with hosts.together(orderly=(Stopped,)):
            if hosts.is_main():
                hosts.log_to(lambda text: print(f"log: {text}", flush=True))
            deed(name, light)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Stopped:
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:] == ["light"]))
