"""When Pallas kernels are used, and how they are launched: on a GPU, compiled by Triton."""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax import devices

ROWS = 4  # of a program of the norm's kernels


def by_kernels(x: jax.Array) -> bool:
    """Whether x lies on one GPU, in a size that the kernels take. XLA's partitioner could not split a kernel."""
    own = not jax.sharding.get_abstract_mesh().empty and not devices.partitioned()
    rows = x.size // x.shape[-1]
    return devices.platform() == "gpu" and own and rows % ROWS == 0 and x.shape[-1] % 64 == 0


def launch(kernel: Callable, grid, inputs, outputs, *, warps: int, stages: int = 1, **more) -> list[jax.Array]:
    """The results of a kernel's programs over `grid`. inputs: (array, BlockSpec); outputs: (BlockSpec, shape, dtype).

    An input may be None, and so is its reference in the kernel then.
    Triton compiles it; where programs are traced for a CPU, as in tests, it is interpreted, slowly.
    """
    arrays, in_specs = zip(*((x, None if x is None else spec) for x, spec in inputs))
    more.setdefault("interpret", devices.platform() == "cpu")
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for spec, _, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        **more,
    )(*arrays)
