"""The compiled train step of a stage: how many rows at a time fit the devices, by the compiler's own analysis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nanochat_jax.mesh import sharding
from nanochat_jax.model import attention, lora, remat
from nanochat_jax.model.gpt import cast_matrices, graph_of, init_params
from nanochat_jax.stages.run import Run
from nanochat_jax.training import loop, memory


@dataclass(frozen=True)
class Step:
    """A compiled train step and the shape of its batches: accumulation x rows over the whole mesh."""

    run: Callable
    accumulation: int
    rows: int


def compile_step(
    run: Run,
    name: str,
    optimizer,
    batch_tokens: int,
    eight_bits: bool = False,
    lora_rank: int | None = None,
    draw: Callable | None = None,
) -> Step:
    """The step of stage `name` for a batch of `batch_tokens`.

    eight_bits: with its products in 8-bit floats. lora_rank: of adapters; it then takes the frozen parameters as well.
    draw: as `loop.make_step` has it.
    """
    length = run.config.model.sequence_len
    per_device = memory.rows_per_device(name, batch_tokens, length, run.mesh)
    join: Callable | None = None
    frozen: tuple = ()
    if lora_rank:
        fixed = jax.eval_shape(lambda: cast_matrices(init_params(run.gpt_config, 0), run.training_dtype))
        join, frozen = lora.merged, (sharding.abstract(fixed, run.mesh),)

    def step_of(level: str):
        graph = graph_of(run.gpt_config, run.training_dtype, eight_bits, level)
        return loop.make_step(graph, optimizer, run.training_dtype, run.mesh, join, draw=draw)

    arrays = {"tokens": np.int32, "targets": np.int32}
    state = abstract_state(run, optimizer, lora_rank)
    return fit_step(run, name, step_of, state, arrays, (per_device, length), frozen=frozen)


def fit_step(
    run: Run, name: str, step_of, state, arrays: dict, shape: tuple[int, int], held: int = 0, frozen: tuple = ()
) -> Step:
    """The jitted step of a level of `remat`, compiled for the abstract `state` and a batch of `arrays` (name -> type),
    each of `shape` on each data-parallel device. frozen: further abstract arguments of it, if any.

    Its micro-batches have the stage's micro_batch rows on a device, or the most that fit beside `held` bytes;
    accumulation makes up the rest.
    """
    (per_device, length), mesh, compiled = shape, run.mesh, dict[tuple[str, int], Any]()
    sizes = memory.micro_batches(per_device, getattr(run.config, name).micro_batch)
    shapes, split_heads = attention.shapes_of(run.gpt_config, length, run.training_dtype), mesh.shape["tensor"] > 1
    attention.choose(shapes, sizes[0], run.cache_dir, run.config.attention, split_heads=split_heads, say=run.log.write)

    def needed(level: str, size: int) -> int:
        if (level, size) not in compiled:
            whole = (per_device // size, size * sharding.data_parallel(mesh), length)
            split = sharding.rows(mesh, leading=1)
            batch = {k: jax.ShapeDtypeStruct(whole, dtype, sharding=split) for k, dtype in arrays.items()}
            compiled[level, size] = step_of(level).lower(state, batch, *frozen).compile()
        return memory.needed_bytes(compiled[level, size])

    limit = memory.device_bytes() - held
    level, size = memory.cheapest_that_fits(remat.levels(run.config.remat), sizes, needed, limit, name)
    need, how = needed(level, size) / 1e9, "" if level == "none" else f" with remat={level}"
    run.log.write(f"{name}: {size} rows at a time{how} need {need:.2f} of {limit / 1e9:.2f} GB on each device")
    return Step(compiled[level, size], per_device // size, size * sharding.data_parallel(mesh))


def abstract_state(run: Run, optimizer, lora_rank: int | None = None):
    """The train state, of adapters if lora_rank is set, as shapes, types and shardings."""
    cfg, seed = run.gpt_config, run.config.seed

    def state():
        params = lora.init(cfg, lora_rank, seed) if lora_rank else None
        return loop.init_state(cfg, optimizer, seed, run.mesh, params)

    return sharding.abstract(jax.eval_shape(state), run.mesh)


def place(batch: dict, accumulation: int, mesh) -> dict:
    """Host arrays (rows, T) as device arrays (accumulation, rows / accumulation, T), rows split over the mesh."""
    put = sharding.rows(mesh, leading=1)
    return {k: jax.device_put(v.reshape(accumulation, -1, v.shape[-1]), put) for k, v in batch.items()}
