"""Programs for GPUs that are not here: what they call, and what is said where the libraries are missing."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.config import MeshConfig
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import sharding
from nanochat_jax.model import attention, loss
from nanochat_jax.planning import targets
from nanochat_jax.planning.step import TrainStep, recipe
from nanochat_jax.training import memory

LIBRARIES = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def attend(window):
    shape = jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16)

    def loss(q, k, v):
        return attention.causal_attention(q, k, v, window).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)), (shape, shape, shape)


@pytest.mark.parametrize("window, said", [(512, '"sliding_window_length": 513'), (None, '"sliding_window_length": 0')])
def test_attention_is_lowered_to_cudnn_with_its_window(window, said):
    f, args = attend(window)
    kernels = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "__gpu$xla.gpu.triton")
    skip = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
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


def eight_bit_products(text: str) -> int:
    """How many products are of two arrays of 8-bit values times a scale: what XLA makes cuBLASLt's 8-bit ones of."""
    found = 0
    for function in text.split("func.func")[1:]:
        made = dict(re.findall(r"(%\S+) = (.*)", function))

        def scaled(name, made=made):
            times = re.match(r"stablehlo.multiply (%\w+),", made.get(name, ""))
            return bool(times) and re.match(r"stablehlo.convert .*xf8", made.get(times.group(1), "")) is not None

        dots = (re.match(r"stablehlo.dot_general (%\w+), (%\w+)", line) for line in made.values())
        found += sum(all(map(scaled, dot.groups())) for dot in dots if dot)
    return found


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_whole_step_is_lowered_without_the_arrays_that_it_must_not_have(precision):
    T, rows, vocab = 1024, 16, 640
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    made = TrainStep(recipe(2, T, vocab, precision=precision), mesh)
    array = made.tokens(rows, 2)
    kernels = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "__gpu$xla.gpu.triton")
    skip = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    with targets.tracing("h100"):
        exported = jax.export.export(made.jitted(), platforms=["cuda"], disabled_checks=skip)
        text = exported(made.state, {"tokens": array, "targets": array}).mlir_module()
    types = set(re.findall(r"tensor<([^>]*)>", text))
    chunk = f"{loss.GPU_CHUNK}x{vocab}x"
    assert f"{chunk}bf16" in types and f"{chunk}f32" not in types, "the logits of a chunk, in 16 bits alone"
    assert not {t for t in types if t.startswith((f"{rows * T}x{vocab}x", f"{rows}x{T}x{vocab}x"))}, "of all tokens"
    assert not {t for t in types if f"x{T}x{T}x" in f"x{t}"}, "a (T, T) mask"
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 4  # forward and backward of each layer, once: a scan holds the micro-batches
    eight = eight_bit_products(text)
    # of each layer q, k, v, two projections and the MLP's first: forward, and both ways back; the loss has three
    assert eight == (2 * 6 * 3 + 3 if precision == "fp8" else 0)
    # and of them those on the way back, which sum over a batch's tokens, do not take the 14 bits of fast accumulation
    assert text.count("precision = [HIGHEST, HIGHEST]") == (2 * 6 * 2 + 2 if precision == "fp8" else 0)
