"""Attention in blocks against the definition, with its gradients; and how a backend is chosen."""

import json
import math
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import ROOT, relative_error
from nanochat_jax import config
from nanochat_jax.errors import UserError
from nanochat_jax.mesh import hosts
from nanochat_jax.model import attention
from nanochat_jax.model.attention import Backend, Shape
from nanochat_jax.planning import targets

blocks = attention.BACKENDS["blocks"].run


def plain(q, k, v, window):
    """The definition, over the whole square."""
    T, N = q.shape[1], q.shape[3]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen = (distance >= 0) & (distance <= (T if window is None else window))
    scores = jnp.where(seen, jnp.einsum("bthn,bshn->bhts", q, k) / math.sqrt(N), -jnp.inf)
    return jnp.einsum("bhts,bshn->bthn", jax.nn.softmax(scores), v)


def with_gradients(f, args, window):
    def both(*args):
        out, pull = jax.vjp(lambda *x: f(*x, window), *args[:3])
        return out, *pull(args[3])

    return jax.jit(both)(*args)


@pytest.mark.parametrize(
    "T, window, H, K",
    [
        (160, None, 2, 2),
        (160, 70, 4, 2),
        (75, 17, 3, 1),  # no block divides T
        (64, 0, 2, 2),  # each position sees itself alone
    ],
)
def test_blocks_equal_the_definition(T, window, H, K):
    args = attention._random(Shape(T, H, K, 16, "float32", window), 2)
    want = with_gradients(plain, args, window)
    for got, right in zip(with_gradients(blocks, args, window), want):
        np.testing.assert_allclose(got, right, atol=5e-6)


def test_blocks_in_bfloat16_are_as_close_as_its_rounding():
    args = attention._random(Shape(100, 4, 2, 16, "bfloat16", 40), 1)
    want = with_gradients(plain, [x.astype(jnp.float32) for x in args], 40)
    for got, right in zip(with_gradients(blocks, args, 40), want):
        assert got.dtype == jnp.bfloat16
        assert relative_error(got.astype(jnp.float32), right) < 0.006


def test_keys_that_no_row_of_a_block_sees_are_not_read():
    """NaN in keys and values that lie before the windows of the queries asked reaches neither output nor gradients."""
    T, window = 128, 32
    q, k, v, do = attention._random(Shape(T, 2, 2, 16, "float32", window), 1)
    k, v = (x.at[:, :32].set(jnp.nan) for x in (k, v))  # the last block of queries sees positions from 32 on
    out, dq, dk, dv = with_gradients(blocks, (q, k, v, do), window)
    assert np.isfinite(out[:, 96:]).all() and np.isfinite(dq[:, 96:]).all()
    assert np.isfinite(dk[:, 96:]).all() and np.isfinite(dv[:, 96:]).all()
    assert np.isnan(out[:, :32]).any()


# ------------------------------------------------------------------------------------------------- the choice

SHAPE = Shape(64, 2, 1, 16, "float32", 20)


def slow(q, k, v, window):
    """Right, after products that come to nothing."""
    nothing = jax.lax.fori_loop(0, 20, lambda i, x: jnp.tanh(x @ x), jnp.zeros((300, 300))).sum()
    return blocks(q + jax.lax.stop_gradient(nothing), k, v, window)


def fails(q, k, v, window):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.fixture
def fakes(monkeypatch):
    """A table of five backends of which two are right and one of these fast, and nothing chosen yet."""
    table = {
        "slow": Backend(slow, lambda *_: True),
        "wrong": Backend(lambda q, k, v, window: blocks(q, k, v, window - 1), lambda *_: True),
        "fails": Backend(fails, lambda *_: True),
        "elsewhere": Backend(fails, lambda shape, platform: platform == "nvidia"),
        "blocks": attention.BACKENDS["blocks"],
    }
    monkeypatch.setattr(attention, "BACKENDS", table)
    monkeypatch.setattr(attention, "MEASURED_FROM", 64)
    monkeypatch.setattr(attention, "_chosen", {})
    return table


def test_the_fastest_that_is_right_is_chosen_once_and_the_others_are_named(fakes, tmp_path, monkeypatch):
    said = []
    assert attention.choose([SHAPE], 1, tmp_path, say=said.append) == {SHAPE: "blocks"}
    text = "\n".join(said)
    assert "blocks, of slow" in text and "for 1 rows" in text
    assert "wrong left out: output is off by" in text and "1% allowed" in text
    assert "fails left out: RuntimeError: no kernel image is available" in text and "elsewhere" not in text

    (kept,) = json.loads((tmp_path / "attention.json").read_text()).values()
    kept = kept[str(SHAPE)]
    assert kept["backend"] == "blocks" and set(kept["ms"]) == {"slow", "blocks"} and kept["rows"] == 1
    assert kept["ms"]["slow"] > kept["ms"]["blocks"] > 0 and set(kept["left_out"]) == {"wrong", "fails"}

    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
    assert attention.choose([SHAPE], 2, tmp_path, say=pytest.fail) == {SHAPE: "blocks"}
    (tmp_path / "other.py").write_text("# a kernel was changed")
    monkeypatch.setattr(attention, "__file__", str(tmp_path / "other.py"))
    monkeypatch.setattr(attention, "measure", lambda *_: ({"slow": 1.0, "blocks": 2.0}, {}))
    assert attention.choose([SHAPE], 2, tmp_path, say=list) == {SHAPE: "slow"}


def test_what_was_chosen_is_what_a_trace_uses(fakes, tmp_path):
    called = []
    fakes["slow"] = Backend(lambda *a: called.append(a) or blocks(*a), lambda *_: True)
    x = jax.ShapeDtypeStruct((3, 64, 2, 16), jnp.float32)
    one = jax.ShapeDtypeStruct((3, 64, 1, 16), jnp.float32)
    attention.choose([SHAPE], 2, tmp_path, "slow", say=pytest.fail)
    jax.eval_shape(lambda q, k, v: attention.causal_attention(q, k, v, 20), x, one, one)
    assert len(called) == 1
    jax.eval_shape(lambda q, k, v: attention.causal_attention(q, k, v, 21), x, one, one)  # another shape
    assert len(called) == 1


def test_a_new_process_reads_what_was_chosen(tmp_path):
    (tmp_path / "attention.json").write_text(json.dumps({attention._place(): {str(SHAPE): {"backend": "other"}}}))
    program = f"""
from pathlib import Path
from nanochat_jax.model import attention
other = attention.Backend(None, lambda *_: True)
attention.BACKENDS["other"], attention.MEASURED_FROM = other, 0
shape = attention.Shape{tuple(SHAPE)}
print(attention.choose([shape], 2, Path({str(tmp_path)!r}))[shape])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "other", run.stderr


def test_process_0_chooses_for_all(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    monkeypatch.setattr(hosts, "gather", lambda name, value: [["slow"], value])
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured beside process 0"))
    assert attention.choose([SHAPE], 2, tmp_path) == {SHAPE: "slow"}


def test_on_a_cpu_nothing_is_measured(tmp_path):
    assert attention.choose([SHAPE._replace(T=4096)], 2, tmp_path, say=pytest.fail) == {}
    assert not list(tmp_path.iterdir())


def test_a_backend_that_does_not_take_a_shape_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"attention=cudnn does not take T=64 .* \(cpu\); take attention=auto or one of b"
    ):
        attention.choose([SHAPE], 2, tmp_path, "cudnn")
    half = Shape(2048, 8, 8, 128, "bfloat16", 512)
    with (
        targets.tracing("h100"),
        pytest.raises(UserError, match=r"nvidia, heads split by mesh.tensor\); .* one of blocks$"),
    ):
        attention.choose([half], 2, tmp_path, "cudnn", split_heads=True)


def test_what_the_backends_take():
    takes = {name: backend.takes for name, backend in attention.BACKENDS.items()}
    half = Shape(2048, 8, 8, 128, "bfloat16", 512)
    assert all(f(half, "nvidia") for f in takes.values())
    for shape, platform in [
        (half, "cpu"),
        (half, "gpu"),
        (half._replace(dtype="float32"), "nvidia"),
        (half._replace(N=100), "nvidia"),
    ]:
        assert not takes["cudnn"](shape, platform)
    assert takes["blocks"](half, "cpu") and takes["blocks"](half, "gpu")


def test_flash_is_there_where_its_kernels_are_installed(monkeypatch, tmp_path):
    """Asked as cuDNN is: causal, and a window of so many positions before each, -1 for all."""

    def kernel(q, k, v, *, is_causal, window_size):
        asked.append((is_causal, window_size))
        return blocks(q, k, v, None if window_size[0] < 0 else window_size[0])

    asked, half = [], Shape(64, 4, 2, 16, "bfloat16", 20)
    with targets.tracing("h100"):
        assert attention.takers(half) == ["cudnn", "blocks"]
        with pytest.raises(UserError, match="attention=flash needs the package dew-flash-attn-cu13, which is not inst"):
            attention.choose([half], 2, tmp_path, "flash")
        there = SimpleNamespace(flash_mha=kernel, __spec__=ModuleSpec("dew_flash_attn", None))
        monkeypatch.setitem(sys.modules, "dew_flash_attn", there)
        assert attention.takers(half) == ["cudnn", "flash", "blocks"]
        assert attention.takers(half._replace(dtype="float32")) == ["blocks"]
    assert attention.takers(half) == ["blocks"]
    for window in (20, None):
        q, k, v, _ = attention._random(half, 2)
        found = attention.causal_attention(q, k, v, window, backend="flash")
        assert jnp.array_equal(found, attention.causal_attention(q, k, v, window, backend="blocks"))
    assert asked == [(True, (20, 0)), (True, (-1, 0))]


def test_the_setting_knows_the_backends():
    for name in ("auto", *attention.BACKENDS):
        config.check(config.RunConfig(attention=name))
    with pytest.raises(UserError, match=f"attention=fast is not one of auto, {', '.join(attention.BACKENDS)}"):
        config.check(config.RunConfig(attention="fast"))


def test_where_heads_are_split_no_kernel_is_called(monkeypatch):
    asked = []
    fake = Backend(lambda q, k, v, window: asked.append(q.shape) or blocks(q, k, v, window), lambda *_: True)
    monkeypatch.setitem(attention.BACKENDS, "kernel", fake)
    monkeypatch.setattr(attention, "default_backend", lambda dtype: "kernel")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q = jnp.ones((4, 32, 2, 8))

    def whole(manual):
        how = {"in_specs": jax.P("data"), "out_specs": jax.P("data"), "axis_names": manual, "check_vma": False}
        jax.eval_shape(jax.shard_map(lambda q: attention.causal_attention(q, q, q), mesh=mesh, **how), q)

    whole({"data"})
    assert not asked
    whole({"data", "tensor"})
    assert asked == [(2, 32, 2, 8)]
