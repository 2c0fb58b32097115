"""A profile of a few steps in the middle of a run, which Perfetto (ui.perfetto.dev) and XProf open."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

STEPS = 3  # that are traced


@contextlib.contextmanager
def traced(step_fn: Callable, folder: Path, start: int, first: int | None) -> Iterator[Callable]:
    """step_fn, whose first call is step `start`, with steps first, first + 1 and first + 2 traced into `folder`."""
    if first is None:
        yield step_fn
        return
    now = start

    def run(*args):
        nonlocal now
        if now == first:
            tracing.enter_context(jax.profiler.trace(folder))
        out = step_fn(*args)
        now += 1
        if now == first + STEPS:
            jax.block_until_ready(out)
            tracing.close()
        return out

    with contextlib.ExitStack() as tracing:
        yield run
