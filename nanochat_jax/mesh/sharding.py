"""The mesh, and the rules from an array's logical axes to the mesh's axes. Every PartitionSpec is made here.

`data` and `fsdp` both split the batch; `fsdp` also splits the parameters along their model width, `tensor` along
heads, MLP and vocabulary. What training alone holds, float32 masters, gradients and moments, is split over `data` as
well (ZeRO, arXiv 1910.02054).

What crosses `data` and `fsdp` is written out here (`over_rows`): parameters gathered once a step, gradients
reduce-scattered once a step. What crosses `tensor` is left to XLA. The same step runs on one device and on many.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import MeshConfig
from nanochat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # mesh axes over which rows are split

SMALL = 4096  # elements of a gradient that is not worth splitting

# logical axis -> mesh axis
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rows": "fsdp"}

# the end of a parameter's path -> its logical axes; what is not here is small and replicated
_LOGICAL = {
    "(wte/embedding|bigrams/embedding|lm_head/weight)": ("vocab", "embed"),
    "[qkv]/weight": ("heads", "embed"),
    "attn/proj/weight": ("embed", "heads"),
    "fc/weight": ("mlp", "embed"),
    "mlp/proj/weight": ("embed", "mlp"),
    "value_embeds/[^/]+/[^/]+": ("rows", "heads"),
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A mesh of all devices; -1 along an axis takes what the others leave. UserError where the sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    named = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh sizes {named} must be positive, and at most one of them -1")
    fixed = math.prod(s for s in sizes if s != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(f"mesh {named} does not fit {len(devices)} devices; set one axis to -1 to take what is left")
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def data_parallel(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in BATCH)


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """A batch whose rows are axis `leading`: (..., rows, T)."""
    return NamedSharding(mesh, P(*([None] * leading), BATCH))


def split_rows(arrays, mesh: Mesh):
    """Host arrays (R, ...), the same on every host, on the devices."""
    split = rows(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, split, lambda at: a[at]), arrays)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, of which other hosts may have a part."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _name(path) -> str:
    """blocks/0/attn/q/weight; flax ends a path with /value."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def spec(path, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of a parameter by the end of its tree path.

    An axis that its mesh axis does not divide is not split.
    """
    for pattern, logical in _LOGICAL.items():
        if re.search(f"(^|/){pattern}$", _name(path)) and len(logical) == len(shape):
            axes = [RULES[a] for a in logical]
            return P(*(a if n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape)))
    return P()


def state_spec(path, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of a parameter's float32 master, gradient and moments: the parameter's, and `data` on the first
    axis that it fits.

    An axis that `tensor` splits is taken last. A small array is as its parameter.
    """
    parts = [*spec(path, shape, mesh)]
    parts += [None] * (len(shape) - len(parts))
    data = mesh.shape["data"]
    if data == 1 or math.prod(shape) < SMALL:
        return P(*parts)
    joined = {None: "data", "fsdp": ("fsdp", "data"), "tensor": ("data", "tensor")}
    for axis in sorted(range(len(shape)), key=lambda axis: parts[axis] == "tensor"):
        if shape[axis] % (mesh.shape.get(parts[axis], 1) * data) == 0:
            parts[axis] = joined[parts[axis]]
            break
    return P(*parts)


def _shardings(tree, mesh: Mesh, rule: Callable):
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, rule(path, tuple(x.shape), mesh)), tree)


def tree_shardings(tree, mesh: Mesh):
    """NamedShardings for a pytree of parameters, or of a whole train state, from the paths and shapes of its leaves."""

    def rule(path, shape, mesh):
        return (state_spec if _name(path).startswith(("params/", "opt_state/")) else spec)(path, shape, mesh)

    return _shardings(tree, mesh, rule)


def constrain(tree, mesh: Mesh, rule: Callable):
    """A tree of parameters, or of what has their shapes, split as `rule` (spec or state_spec) says."""
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh, rule))


def abstract(tree, mesh: Mesh):
    """ShapeDtypeStructs with shardings, as a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_shardings(tree, mesh)
    )


# ------------------------------------------------------------------------------------------- within the train step


def _axes(part) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _specs(tree, mesh: Mesh, rule: Callable):
    """What the rule's specs say of the batch's axes."""

    def manual(sharding):
        return P(*(tuple(a for a in _axes(part) if a in BATCH) or None for part in sharding.spec))

    return jax.tree.map(manual, _shardings(tree, mesh, rule))


def _per_device(f: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """f over the devices of the batch's axes. With all axes manual, kernels such as cuDNN's attention are called as
    they are, without a partitioner."""
    axes = set(BATCH if mesh.shape["tensor"] > 1 else AXES)
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _gather(params, specs, mesh: Mesh):
    """A device's parts of the parameters to the whole ones, along the batch's axes."""

    def whole(x, spec):
        for axis, part in enumerate(spec):
            for name in reversed(_axes(part)):  # the minor one first
                x = jax.lax.all_gather(x, name, axis=axis, tiled=True) if mesh.shape[name] > 1 else x
        return x

    return jax.tree.map(whole, params, specs)


def over_rows(local: Callable, mesh: Mesh) -> Callable:
    """f(params, frozen, *batch) -> (loss, gradients of params) over the rows of all devices, from `local`, the same
    over a device's own.

    params come and gradients go as `state_spec` splits them, frozen comes as `spec` does; batch arrays are (A, R, T).
    Every device gathers both, runs `local`, and of the summed gradients keeps its part: a reduce-scatter, where an
    all-reduce would send twice as much and leave everyone the whole.
    """

    def scatter(x, spec):
        left = [name for name in BATCH if mesh.shape[name] > 1]
        for axis, part in enumerate(spec):
            for name in _axes(part):
                if name in left:
                    x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
                    left.remove(name)
        return jax.lax.psum(x, tuple(left)) if left else x

    def whole(params, frozen, *batch):
        held, fixed = _specs(params, mesh, state_spec), _specs(frozen, mesh, spec)

        def on_device(params, frozen, *batch):
            loss, grads = local(_gather(params, held, mesh), _gather(frozen, fixed, mesh), *batch)
            return jax.lax.psum(loss, BATCH), jax.tree.map(scatter, grads, held)

        split = P(None, BATCH)
        mapped = _per_device(on_device, mesh, (held, fixed, *[split for _ in batch]), (P(), held))
        return mapped(params, frozen, *batch)

    return whole


def each_row(local: Callable, mesh: Mesh, leading: int = 1) -> Callable:
    """f(params, *batch) -> arrays whose axis `leading` is rows, as the batch's are: (A, R, T), or (R, ...) where it is
    0; from `local`, the same over a device's own rows."""

    def whole(params, *batch):
        held, split = _specs(params, mesh, spec), P(*([None] * leading), BATCH)

        def on_device(params, *batch):
            return local(_gather(params, held, mesh), *batch)

        return _per_device(on_device, mesh, (held, *[split for _ in batch]), split)(params, *batch)

    return whole


def over_matrices(local: Callable, spec: P, mesh: Mesh | None) -> Callable:
    """f(stacked, small) from `local`, which sees a share of the matrices, each of them whole.

    stacked (K, m, n), each matrix split as `spec` says, before and after; small (K, ...), replicated. Every device
    swaps parts of all matrices for the whole of some, K padded with zeros to a multiple of the devices, and back: two
    all-to-alls, and the products of `local` cross no link.
    """
    if mesh is None or mesh.size == 1:
        return local
    parts = [(axis, name) for axis, part in enumerate(spec, 1) for name in reversed(_axes(part))]  # the minor one first
    copies = [name for name in AXES if name not in {name for _, name in parts}]  # along which all hold the same

    def share(x, names):
        for name in names:
            size = len(x) // mesh.shape[name]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size)
        return x

    def unshare(x, names):
        for name in reversed(names):
            x = jax.lax.all_gather(x, name, axis=0, tiled=True)
        return x

    def on_device(x, small):
        x = share(x, copies)
        for axis, name in parts:
            x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
        order = [*copies, *(name for _, name in parts)]
        x, small = local(x, share(small, order))
        for axis, name in reversed(parts):
            x = jax.lax.all_to_all(x, name, split_axis=axis, concat_axis=0, tiled=True)
        return unshare(x, copies), unshare(small, order)

    def whole(stacked, small):
        count, held = len(stacked), P(None, *spec)
        padded = [jnp.pad(x, ((0, -count % mesh.size), (0, 0), (0, 0))) for x in (stacked, small)]
        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(held, P()), out_specs=(held, P()), check_vma=False)
        return tuple(x[:count] for x in mapped(*padded))

    return whole
