"""GPUs that are not here: programs compiled for them on any machine, by the compiler that a node would use.

XLA compiles for a described device without having one (openxla/xla#16913); only the `gpu` extra must be installed.
Nothing can run. Such a compilation does not know cuDNN's scratch (its attention's backward pass keeps dq in float32,
B T H N values of one layer at a time), nor what autotuning on the device would choose.
"""

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax

from nanochat_jax.devices import tracing_for
from nanochat_jax.errors import UserError

HOST = 8  # GPUs of a host, where there are several
CUDA, CUDNN = (13, 0), (9, 10, 0)  # the versions that programs are lowered for


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU as its maker describes it. gb: memory in 10^9 bytes; bandwidth in bytes/s; link in
    bytes/s a direction to the others of a host; clock in GHz."""

    name: str
    capability: tuple[int, int]
    gb: float
    bandwidth: float
    link: float
    multiprocessors: int
    fpus: int  # float32 lanes of a multiprocessor
    threads: int  # resident threads of a multiprocessor
    shared_kb: int  # shared memory of a multiprocessor
    l2_mb: int
    clock: float

    def description(self) -> str:
        """An xla GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_kb << 10}
  shared_memory_per_block_optin: {(self.shared_kb - 1) << 10}
  core_count: {self.multiprocessors} fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_mb << 20} clock_rate_ghz: {self.clock}
  device_memory_size: {int(self.gb * 1e9)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }}
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
device_description_str: "{self.name}"
"""


GPUS = {
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25.3, 1.01e12, 32e9, 128, 128, 1536, 100, 72, 2.52),
    "a100": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 42.3, 1.56e12, 300e9, 108, 64, 2048, 164, 40, 1.41),
    "a100_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 84.9, 2.04e12, 300e9, 108, 64, 2048, 164, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 84.9, 3.35e12, 450e9, 132, 128, 2048, 228, 50, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 150.1, 4.8e12, 450e9, 132, 128, 2048, 228, 50, 1.98),
}


def devices(kind: str, count: int = 1) -> list[jax.Device]:
    """`count` devices, HOST of them on a host where that goes, for `sharding.make_mesh`, that programs can be compiled
    for and not run on. UserError for a kind that is not in GPUS, or without the libraries."""
    from jax.experimental import topologies

    if kind not in GPUS:
        raise UserError(f"there is no description of a GPU {kind!r}; there are {', '.join(GPUS)}")
    if not any(p.platform == "gpu" for p in jax.devices()):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # needs a device
    hosts = 1 if count % HOST else count // HOST
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[kind].description(), topology=f"1x{hosts}x{count // hosts}"
        )
    except (NotImplementedError, RuntimeError, ValueError) as e:
        raise UserError(
            f"cannot compile for {kind} ({str(e).splitlines()[0]}); install the GPU libraries, uv sync --extra gpu, "
            "and set JAX_PLATFORMS=cpu where there is no GPU"
        ) from None
    return topology.devices


@contextlib.contextmanager
def tracing(kind: str) -> Iterator[None]:
    """Programs traced in here call what `kind` has: cuDNN's attention, which jax would look for on this machine."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    gpu = GPUS[kind]

    def parsed(capability: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", capability)))

    checks: dict[str, Any] = {
        "check_cudnn_version": lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2],
        "check_compute_capability": lambda least: gpu.capability >= parsed(least),
        "is_cuda_compute_capability_equal": lambda wanted: gpu.capability == parsed(wanted),
    }
    with tracing_for("gpu", cudnn=True), mock.patch.multiple(cudnn, **checks), _triton_for(gpu):
        yield


def _triton_for(gpu: Gpu):
    """Pallas' kernels are lowered for `gpu`. jax 0.10 leaves it to XLA, which knows; later ones ask this machine."""
    try:
        gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    except ImportError:
        return contextlib.nullcontext()
    info = gpu_info.get_gpu_info_from_version(gpu_info.gpu_version_from_device_kind(gpu.name))
    return mock.patch.object(gpu_info, "get_gpu_info", lambda: info)
