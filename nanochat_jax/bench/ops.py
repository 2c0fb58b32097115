"""The parts of a train step one by one, each next to its roofline on this very device.

The roofline is the larger of two times: a part's FLOPs at the rate of a large matrix product in the same precision, and
the bytes that it must move at the rate of a large copy; both rates are measured first. Backward passes are included.
"""

import argparse
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax import devices
from nanochat_jax.bench import frame
from nanochat_jax.config import GPTConfig, MeshConfig, OptimConfig
from nanochat_jax.kernels import fp8, fused
from nanochat_jax.kernels.products import product
from nanochat_jax.kernels.segments import look_up
from nanochat_jax.mesh import sharding
from nanochat_jax.model import attention, loss
from nanochat_jax.model.gpt import rotary_tables
from nanochat_jax.planning.step import base_plan, recipe
from nanochat_jax.training import optim

ROUNDS, SECONDS = 5, 0.1  # a figure is the best of so many rounds, each of about so long
LARGE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # the ceiling's matrices


def options(p: argparse.ArgumentParser) -> None:
    frame.add_shape(p, depth=12 if jax.default_backend() != "cpu" else 4, rows=8, seq=2048)
    p.add_argument("--only", default="", help="parts whose names begin so, several after commas")


@dataclass(frozen=True)
class Part:
    """A function with its arguments, and what it cannot do without: FLOPs of its products, bytes to and from memory."""

    name: str
    run: Callable
    args: tuple
    flops: float
    bytes: float


def fastest(call: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of one call, back to back: the best of ROUNDS rounds of so many calls, compiled before."""

    def a_round() -> None:
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)

    a_round()
    return min(timeit.repeat(a_round, number=1, repeat=ROUNDS)) / calls


def seconds_of(run: Callable, args: tuple) -> float:
    """Of one call, compiled as within a step."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    f = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False))
    jax.block_until_ready(f(*args))
    once = timeit.timeit(lambda: jax.block_until_ready(f(*args)), number=1)
    return fastest(lambda: f(*args), max(1, int(SECONDS / once)))


def normal(seed: int, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def ceilings(dtype, eight_bits: bool) -> tuple[float, float]:
    """(FLOP/s of a large product, bytes/s of a large copy), both measured."""
    n = LARGE[devices.platform()]
    a, b = normal(0, (n, n), dtype), normal(1, (n, n), dtype)
    args: tuple = (fp8.quantize(a), fp8.quantize(b)) if eight_bits else (a, b)
    run = partial(fp8.dot, contract=(1, 1)) if eight_bits else product
    return 2 * n**3 / seconds_of(run, args), copy_rate(16 * n * n)


def copy_rate(size: int) -> float:
    """Bytes/s, read and written, of an array of `size` bytes that is overwritten: new memory has a price on a CPU."""
    add, big = jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros((size // 4,), jnp.float32)

    def step() -> jax.Array:
        nonlocal big
        big = add(big)
        return big

    return 2 * size / fastest(step, 4)


def total(f: Callable) -> Callable:
    """The gradient in all arguments of the squares of f's results, summed: it depends on every element."""

    def summed(args):
        return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(f(*args)))

    return lambda *args: jax.grad(summed)(args)


def parts(cfg: GPTConfig, rows: int, dtype, eight_bits: bool) -> Iterator[Part]:
    T, D, H, N, V = cfg.sequence_len, cfg.n_embd, cfg.n_head, cfg.head_dim, cfg.padded_vocab
    M = rows * T
    x = normal(0, (M, D), dtype)
    multiply: Callable = (lambda x, w: fp8.products(x, (w,))) if eight_bits else product
    for name, out, inner in (("qkv, proj", D, D), ("mlp up", 4 * D, D), ("mlp down", D, 4 * D)):
        a, w = normal(1, (M, inner), dtype), normal(2, (out, inner), dtype)
        yield Part(f"product {name}", total(multiply), (a, w), 6.0 * M * inner * out, 2 * (a.nbytes + w.nbytes))
    q = normal(3, (rows, T, H, N), dtype)
    for shape in attention.shapes_of(cfg, T, dtype):
        seen = T if shape.window is None else shape.window + 1
        flops = 14.0 * rows * H * N * (seen * T - seen * (seen - 1) / 2)
        for backend in attention.takers(shape):
            name = f"attention {'of all' if shape.window is None else shape.window} {backend}"
            attend = partial(attention.causal_attention, window=shape.window, backend=backend)
            yield Part(name, total(attend), (q, q, q), flops, 6 * q.nbytes)
    rope = rotary_tables(jnp.arange(T), N, cfg.rope_base)
    rotate = partial(fused.rotate_and_norm, rope=rope, gain=cfg.qk_gain, eps=cfg.norm_eps)
    yield Part("elementwise RoPE and norm", total(rotate), (q,), 0.0, 2 * q.nbytes)
    y = normal(8, x.shape, dtype)
    add = partial(fused.add_and_norm, eps=cfg.norm_eps)
    yield Part("elementwise residual, norm", total(add), (x, y), 0.0, 8 * x.nbytes)
    up = normal(4, (M, 4 * D), dtype)
    yield Part("elementwise relu squared", total(fused.relu_squared), (up,), 0.0, 2 * up.nbytes)
    head, ids = normal(5, (V, D), dtype), jax.random.randint(jax.random.key(6), (M,), 0, cfg.vocab_size)
    nll = partial(loss.weighted_nll, vocab=cfg.vocab_size, softcap=cfg.softcap, eight_bits=eight_bits)
    gradient = jax.grad(lambda h, w: nll(h, w, ids, jnp.full((M,), 1.0 / M)), argnums=(0, 1))
    yield Part("loss", gradient, (x, head), 6.0 * M * D * V, 2 * (x.nbytes + head.nbytes))
    table = normal(7, (V, D), dtype)
    lookup = jax.grad(lambda t, up: jnp.sum(look_up(t, ids) * up).astype(jnp.float32))
    yield Part("embedding and its gradient", lookup, (table, x), 0.0, x.nbytes + table.nbytes)
    # Muon over the MLP's matrices and AdamW over one table, each with its moments
    L = cfg.n_layer
    schedules = optim.make_schedules(OptimConfig(), 1000, 0.1, "modern")
    matrices = [normal(i, (4 * D, D), jnp.float32) for i in range(L)]
    muon = optim.muon(0.02, schedules, dtype, "modern")
    each = 5 * (2 * 2 * 4 * D * D * D + 2 * D**3)  # X^T X and X P of (4 D, D), and the square of the gram matrix
    flops, moved = float(L * each), 5 * sum(m.nbytes for m in matrices)
    yield Part("optimizer Muon of the MLP", muon.update, (matrices, muon.init(matrices), matrices), flops, moved)
    tables = {"wte": normal(0, (V, D), jnp.float32)}
    adam = optim.adamw(0.3, (0.8, 0.995), 0.001, schedules.lr)
    moved = 7 * tables["wte"].nbytes
    yield Part("optimizer AdamW of a table", adam.update, (tables, adam.init(tables), tables), 0.0, moved)


def run(args: argparse.Namespace) -> dict:
    frame.wait_for_turn()
    config = recipe(args.depth, args.seq, args.vocab, args.pattern, args.precision)
    (cfg, _), eight_bits = base_plan(config), config.base.fp8
    dtype = devices.training_dtype(config.dtype)
    kind = jax.devices()[0].device_kind
    flops, copied = ceilings(dtype, eight_bits)
    print(f"{kind}, {args.precision}: a product reaches {flops / 1e12:.2f} TFLOP/s, a copy {copied / 1e9:.0f} GB/s")
    table, found = frame.Table(), {}
    for part in parts(cfg, args.rows, dtype, eight_bits):
        if not part.name.startswith(tuple(args.only.split(","))):
            continue
        try:
            seconds = seconds_of(part.run, part.args)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as e:  # a backend that this device lacks
            print(f"{part.name:28} {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
            continue
        best = max(part.flops / flops, part.bytes / copied)
        found[part.name] = {"seconds": seconds, "best": best, "flops": part.flops, "bytes": part.bytes}
        table.row(part.name, {"ms": 1e3 * seconds, "at best": 1e3 * best, "reached": best / seconds})
    shape = frame.shown(args, ("depth", "rows", "seq", "vocab", "pattern", "precision"))
    return {"device": kind, "shape": shape, "ceilings": {"flops": flops, "bytes": copied}, "parts": found}
