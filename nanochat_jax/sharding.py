"""The mesh, and the rules from an array's logical axes to the mesh's axes. Every PartitionSpec is made here.

`data` and `fsdp` both split the batch; `fsdp` also splits the parameters along their model width, `tensor` along
heads, MLP and vocabulary. XLA's partitioner does the rest, so the same step runs on one device and on many.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import MeshConfig
from nanochat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # mesh axes over which rows are split

# logical axis -> mesh axis
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rows": "fsdp", None: None}

# last names of a parameter's path -> its logical axes; what is not here is small and replicated
_LOGICAL = {
    ("wte", "embedding"): ("vocab", "embed"),
    ("lm_head", "weight"): ("vocab", "embed"),
    ("q", "weight"): ("heads", "embed"),
    ("k", "weight"): ("heads", "embed"),
    ("v", "weight"): ("heads", "embed"),
    ("attn", "proj", "weight"): ("embed", "heads"),
    ("fc", "weight"): ("mlp", "embed"),
    ("mlp", "proj", "weight"): ("embed", "mlp"),
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A mesh of all devices; -1 along an axis takes what the others leave. UserError where the sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    named = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh sizes {named} must be positive, and at most one of them -1")
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(f"mesh {named} does not fit {len(devices)} devices; set one axis to -1 to take what is left")
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def data_parallel(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return int(np.prod([mesh.shape[a] for a in BATCH]))


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """A batch whose rows are axis `leading`: (..., rows, T)."""
    return NamedSharding(mesh, P(*([None] * leading), BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(path, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of a parameter, or of an optimizer moment that has its shape, by the end of its tree path.

    An axis that its mesh axis does not divide is not split.
    """
    names = tuple(n for n in _names(path) if n != "value")
    for length in (3, 2):
        logical = _LOGICAL.get(names[-length:]) if len(names) >= length else None
        if logical is None and length == 2 and len(names) >= 3 and names[-3] == "value_embeds":
            logical = ("rows", "heads")
        if logical is not None and len(logical) == len(shape):
            axes = [RULES[a] for a in logical]
            return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape)))
    return P()


def tree_shardings(tree, mesh: Mesh):
    """NamedShardings for a pytree of parameters, or of a whole train state, from the paths and shapes of its leaves."""
    return jax.tree_util.tree_map_with_path(lambda p, x: NamedSharding(mesh, spec(p, tuple(x.shape), mesh)), tree)


def abstract(tree, mesh: Mesh):
    """ShapeDtypeStructs with shardings, as a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_shardings(tree, mesh)
    )
