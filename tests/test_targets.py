"""Programs for GPUs that are not here: what they call, and what is said where the libraries are missing."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax import attention, memory, targets
from nanochat_jax.errors import UserError

LIBRARIES = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def attend(window):
    shape = jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16)

    def loss(q, k, v):
        return attention.causal_attention(q, k, v, window).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)), (shape, shape, shape)


@pytest.mark.parametrize("window, said", [(512, '"sliding_window_length": 513'), (None, '"sliding_window_length": 0')])
def test_attention_is_lowered_to_cudnn_with_its_window(window, said):
    f, args = attend(window)
    skip = [jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{end}") for end in ("", "Backward")]
    with targets.tracing("h100"):
        text = jax.export.export(f, platforms=["cuda"], disabled_checks=skip)(*args).mlir_module()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2 and all("CAUSAL" in c for c in calls)
    assert all(said.replace('"', "\\22") in c.replace('\\"', "\\22") for c in calls)
    assert "1024x1024" not in text  # no (T, T) mask


def test_outside_of_tracing_this_machine_counts():
    with targets.tracing("h100"):
        assert attention.default_backend(jnp.bfloat16) == "cudnn"
        assert attention.default_backend(jnp.float32) == "blocks"
    assert attention.default_backend(jnp.bfloat16) == ("cudnn" if jax.default_backend() == "gpu" else "blocks")


def test_an_unknown_gpu_is_an_error_that_names_the_known():
    with pytest.raises(UserError, match="no description of a GPU 'h1000'; there are .*h100"):
        targets.devices("h1000")


@pytest.mark.skipif(LIBRARIES, reason="the GPU libraries are installed")
def test_missing_libraries_are_named():
    with pytest.raises(UserError, match="--extra gpu"):
        targets.devices("h100")


@pytest.mark.skipif(not LIBRARIES, reason="the GPU libraries are not installed: uv sync --extra gpu")
@pytest.mark.parametrize("kind", targets.GPUS)
def test_compiles_for_a_gpu_that_is_not_here(kind):
    f, args = attend(512)
    one = jax.sharding.SingleDeviceSharding(targets.devices(kind)[0])
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for a in args]
    with targets.tracing(kind):
        compiled = f.lower(*args).compile()
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()
    size = 2 * 1024 * 2 * 128 * 2
    assert 4 * size <= memory.needed_bytes(compiled) < 20 * size
