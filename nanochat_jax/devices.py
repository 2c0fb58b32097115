"""What chips can do at most: dense bfloat16 products and memory bandwidth, from their makers' data sheets.

A device that is not here has no MFU: n/a is better than a wrong figure.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

# part of jax's device_kind, lower case -> (peak bf16 FLOP/s without sparsity, bytes/s of device memory); first match
_CHIPS = (
    ("gh200", 989e12, 4.0e12),
    ("h200", 989e12, 4.8e12),
    ("h100 nvl", 835e12, 3.9e12),
    ("h100 pcie", 756e12, 2.0e12),
    ("h100", 989e12, 3.35e12),
    ("b200", 2250e12, 8.0e12),
    ("a100", 312e12, 2.0e12),
    ("a10g", 70e12, 0.6e12),
    ("a10", 125e12, 0.6e12),
    ("l40s", 362e12, 0.86e12),
    ("l40", 181e12, 0.86e12),
    ("l4", 121e12, 0.3e12),
    ("rtx 5090", 209.5e12, 1.79e12),
    ("rtx 4090", 165.2e12, 1.01e12),
    ("rtx 3090", 71e12, 0.94e12),
    ("tpu v6", 918e12, 1.64e12),
    ("tpu v5p", 459e12, 2.77e12),
    ("tpu v5", 197e12, 0.82e12),
    ("tpu v4", 275e12, 1.2e12),
)


# (platform, whether it has cuDNN) that programs are traced for, where that is not this machine
_elsewhere: ContextVar[tuple[str, bool] | None] = ContextVar("elsewhere", default=None)


def platform() -> str:
    """cpu, gpu or tpu: what programs are traced for."""
    elsewhere = _elsewhere.get()
    return elsewhere[0] if elsewhere else jax.default_backend()


def has_cudnn() -> bool:
    """Whether what programs are traced for is NVIDIA's."""
    elsewhere = _elsewhere.get()
    if elsewhere:
        return elsewhere[1]
    return jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()


def partitioned() -> bool:
    """Whether XLA's partitioner splits the program that is being traced, over an axis that the program leaves to it: no
    kernel can be called then, as none can be cut (jax's rule for cuDNN's attention fails within a program that splits
    the rows itself, in 0.10 and 0.11, and Pallas' kernels have none)."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(kind == AxisType.Auto and n > 1 for kind, n in zip(mesh.axis_types, mesh.axis_sizes))


@contextlib.contextmanager
def tracing_for(platform: str, cudnn: bool = False) -> Iterator[None]:
    """Programs traced in here are for another platform than this machine's."""
    token = _elsewhere.set((platform, cudnn))
    try:
        yield
    finally:
        _elsewhere.reset(token)


POOL = 0.92  # of a GPU's memory that jax may take; the rest is for CUDA, NCCL and the libraries' own buffers


# XLA's flags on a GPU, each for a reason that was measured (bench/LOG.md)
FLAGS = {
    # the step of depth 12 then compiles in 11 s on an H100, and not in minutes: Triton's tiles are tried one by one
    "xla_gpu_enable_triton_gemm": "false",
    # products that share an operand stay apart: as one they cost a copy of every result, or of the weights
    "xla_gpu_dot_merger_threshold_mb": "0",
}


def prepare() -> None:
    """Lets jax have POOL of each GPU's memory (its own default is 0.75) and XLA its FLAGS, where the environment says
    nothing else. To be called before the first array is made.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(POOL))
    given = os.environ.get("XLA_FLAGS", "")
    more = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *more])


def compute_dtype(name: str) -> jnp.dtype:
    """The type of the matrix products: config.dtype, where auto is bfloat16 on a GPU or TPU and float32 on a CPU;
    of training see `training_dtype`."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def training_dtype(name: str) -> jnp.dtype:
    """`compute_dtype` of what trains: bfloat16 for auto on a CPU that multiplies it twice as fast as float32.

    Evaluation and answers stay in float32 there: a cache of 16-bit floats is converted at every token.
    """
    if name == "auto" and jax.default_backend() == "cpu" and cpu_has_bfloat16():
        name = "bfloat16"
    return compute_dtype(name)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the cores have AVX-512's products of bfloat16; False where Linux does not say."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs in `folder`, so that the next process with the same shapes starts at once; without
    one where that cannot be."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():  # and cannot be made
        return
    # a full disk, and a folder that one may only read, are no reason to warn at every program
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device of this kind, or None."""
    return next((flops for name, flops, _ in _CHIPS if name in kind.lower()), None)


def bandwidth(kind: str) -> float | None:
    """Bytes/s of one device's memory, or None."""
    return next((bandwidth for name, _, bandwidth in _CHIPS if name in kind.lower()), None)
