"""A profile of a few steps in the middle of a run, which Perfetto (ui.perfetto.dev) and XProf open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

STEPS = 3  # that are traced


@contextlib.contextmanager
def traced(step_fn: Callable, folder: Path, start: int, first: int | None) -> Iterator[Callable]:
    """step_fn, whose first call is step `start`, with steps first, first + 1 and first + 2 traced into `folder`."""
    now, tracing = start, False

    def stop() -> None:
        nonlocal tracing
        if tracing:
            jax.profiler.stop_trace()
        tracing = False

    def run(*args):
        nonlocal now, tracing
        if now == first:
            jax.profiler.start_trace(folder)
            tracing = True
        out = step_fn(*args)
        now += 1
        if tracing and now == first + STEPS:
            jax.block_until_ready(out)
            stop()
        return out

    try:
        yield step_fn if first is None else run
    finally:
        stop()
