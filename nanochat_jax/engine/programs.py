"""What the engine runs on the device: prefill of a chunk of prompts, and decoding of a slice of tokens.

A decode step uses kernels where they agree with the plain formulas on this device.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import decode_kernels
from nanochat_jax.engine.sampling import TOP_LOGPROBS, Chance, Settings, log_probabilities, sample
from nanochat_jax.model.gpt import GPT, cast_matrices, merge, softcapped
from nanochat_jax.model.quantize import dequantize, quantize

TOLERANCE = {2: 0.02, 4: 0.001}  # bytes of a number: by what share of an array's norm kernels may be off


class Shapes(NamedTuple):
    """What calls are compiled for: few shapes where a compilation takes long, many where it takes a second."""

    chunks: tuple[int, ...]  # tokens of a prompt that one call prefills
    spans: tuple[int, ...]  # positions that a call looks at: one of these times a power of `factor`
    factor: int  # between widths as well
    slots: int  # of a device: rows of a call, at most
    max_len: int

    @classmethod
    def of(cls, platform: str, slots: int, max_len: int) -> Self:
        if platform == "gpu":
            return cls((32, kv.SLACK), (512,), 4, slots, max_len)
        return cls((16, 64, kv.SLACK), (128, 192), 2, slots, max_len)

    def chunk(self, n: int, patient: bool) -> int:
        """The smallest that holds n. Patient: or half, as two short ones are less work than a long one half empty."""
        return next((c for c in self.chunks if (2 if patient else 1) * c >= n), self.chunks[-1])

    def span(self, n: int) -> int:
        """How many positions a call looks at that needs n."""
        return min(_grown(n, smallest, self.max_len, self.factor) for smallest in self.spans)

    def width(self, n: int, patient: bool = False) -> int:
        """Rows of each device in a call for n. Patient: in larger steps, as compiling costs more than spare rows."""
        return _grown(n, 1, self.slots, 4 if patient else self.factor)


def _grown(n: int, size: int, largest: int, factor: int) -> int:
    """n rounded up to `size` times a power of factor, at most largest."""
    while size < n:
        size *= factor
    return min(size, largest)


class Compiled:
    """A function of the device, jitted: `static` arguments, then params, cache (donated), slots and other arrays.

    Threads that need the same program for the first time wait for the one that compiles it: JAX would have all do it.
    """

    def __init__(self, function: Callable, static: int, **options):
        self.jitted = jax.jit(function, static_argnums=range(static), donate_argnums=static + 1, **options)
        self._static, self._made, self._lock = static, set[tuple](), threading.Lock()

    def __call__(self, *args):
        key, args = self._of(*args)
        with contextlib.nullcontext() if key in self._made else self._lock:
            out = self.jitted(*args)
        self._made.add(key)
        return out

    def compile(self, *args) -> None:
        """What a call with such arguments needs; nothing runs. From any thread: only their shapes are looked at."""
        key, args = self._of(*args)
        with self._lock:
            if key not in self._made:
                how, given = args[: self._static], args[self._static :]
                self.jitted.lower(*how, *abstract(given)).compile()
            self._made.add(key)

    def _of(self, *args) -> tuple[tuple, tuple]:
        """(what a program is known by, its arguments)"""
        how, (params, cache, slots, *rest) = args[: self._static], args[self._static :]
        if slots.shape[1] == cache[0][0].shape[1]:
            slots = None  # all of them, in their order
        return (*how, slots is None, rest[0].shape), (*how, params, cache, slots, *rest)


def abstract(tree):
    """The shapes of arrays, as `jax.jit` tells programs apart."""

    def shape_of(x):
        split = x.sharding if isinstance(x, jax.Array) and x.committed else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) if hasattr(x, "shape") else x

    return jax.tree.map(shape_of, tree)


class Program:
    """What a kind of engine runs on the device: `prefill` and `decode`, compiled for each shape of their arguments.

    fused: decode steps are by kernels, and parameters are as `decode_kernels.joined` gives them. one_core: of a CPU,
    for engines beside each other, which would otherwise wait for the same threads.
    """

    def __init__(self, graph, cfg: GPTConfig, dtype: np.dtype, max_len: int, fused: bool, one_core: bool = False):
        self.graph, self.cfg, self.dtype, self.max_len, self.fused = graph, cfg, dtype, max_len, fused
        options: dict = {"compiler_options": {"xla_cpu_multi_thread_eigen": False}} if one_core else {}
        self.prefill, self.decode = Compiled(self._prefill, 1, **options), Compiled(self._decode, 2, **options)
        self.score = jax.jit(self._score, donate_argnums=1, **options)

    def model(self, params):
        if self.fused:
            return decode_kernels.model(self.graph, self.cfg, params, self.dtype)
        return merge(self.graph, dequantize(params, self.dtype))

    def trunk(self, params, rows, tokens, positions, before):
        """Model, and hidden states (R, T, D) of tokens (R, T) at positions (R, T), -1 for none.

        Keys and values go into the list `rows`; before (R,) are the tokens left of the first ones.
        """
        model, newest = self.model(params), positions.max(axis=1)
        rings = kv.ring_sizes(self.cfg, self.max_len)

        def attend(layer, q, k, v):
            ring = rings[layer]
            keys, values = (kv.append(c, x, positions, ring) for c, x in zip(rows[layer], (k, v)))
            rows[layer] = (keys, values)
            window, offset = self.cfg.windows[layer], self.cfg.key_offset
            return kv.attend(q, keys, values, positions, newest, window, ring, offset)

        return model, model.trunk(tokens, positions, attend, prev_tokens=before)

    def step(self, params, rows, places, token, position, before):
        """Logits (R, V), before the softcap, of one token (R,) a row at position (R,), -1 for none; keys and values go
        into the list `rows`.

        places (R,): for kernels, the slot of `rows` that each row has.
        """
        if self.fused:
            return decode_kernels.step(self.model(params), params, rows, places, self.max_len, token, position, before)
        model, hidden = self.trunk(params, rows, token[:, None], position[:, None], before)
        return model.uncapped(hidden[:, 0])

    def _prefill(self, span, params, cache, slots, tokens, before, start, count):
        """The cache with the keys and values of a chunk of prompts in it.

        slots (D, M); tokens (D * M, C), of which the first count (D * M,) are valid, at positions from start (D * M,).
        """
        steps = jnp.arange(tokens.shape[1])
        positions = jnp.where(steps < count[:, None], start[:, None] + steps, -1)
        rows = kv.take(cache, slots, span)
        self.trunk(params, rows, tokens, positions, before)
        return kv.put(cache, slots, rows, positions)

    def _score(self, params, rows, tokens, targets, before, start, count):
        """`sampling.log_probabilities` of targets (C,) after tokens (C,), of which the first `count` are valid, at
        positions from `start`; and the cache `rows` of this one sequence with the tokens in it."""
        steps = jnp.arange(len(tokens))
        positions = jnp.where(steps < count, start + steps, -1)
        rows = list(rows)
        model, hidden = self.trunk(params, rows, tokens[None], positions[None], before[None])
        return log_probabilities(model.logits(hidden[0]), targets), rows

    def _decode(
        self, span, how, params, cache, slots, last, position, forced, settings: Settings, n, shaped=None, allowed=None
    ):
        """The next n tokens of R = D * M rows: out (R, LONG), of which the first n are valid, and the cache with them.

        slots (D, M), None for all; last (R, 2) the two newest ids of each row (-1 for none); position (R,) that of the
        newest, whose keys are not in the cache yet, negative for an unused row; forced (R, LONG) ids to take in place
        of a sample, -1 for none; shaped: `Shaped`, and allowed: `Allowed`, where `how` says so. out: ids, where
        there is `allowed` which of them are second draws, and where `how` wants them `sampling.log_probabilities`.
        """

        cap = functools.partial(softcapped, softcap=self.cfg.softcap)

        def one(i, carry):
            rows, said, out, shaped = carry
            before, token = said[:, i], said[:, i + 1]
            now = position + i
            rows, here = list(rows), jnp.where((position >= 0) & (now < self.max_len), now, -1)
            uncapped = self.step(params, rows, places, token, here, before)
            logits = cap(uncapped)
            chance = Chance.of(settings, now, logits.shape[1], how)

            def draw(fits=None):
                if fits is None and not how.shaped:
                    return sample(uncapped, settings, chance, how, cap)
                z = logits if fits is None else jnp.where(fits[:, : logits.shape[1]], logits, -jnp.inf)
                z = shaped.applied(z, settings.temperature) if how.shaped else z
                return sample(z, settings, chance if fits is None else chance.again(), how)

            new, wrong = allowed.corrected(draw(), i, draw) if how.formed else (draw(), None)
            new = jnp.where(forced[:, i] >= 0, forced[:, i], new)
            shaped = shaped.taken(new) if how.shaped else shaped
            made = (*([wrong] if how.formed else []), *(log_probabilities(logits, new) if how.logprobs else ()))
            return rows, said.at[:, i + 2].set(new), tuple(o.at[:, i].set(x) for o, x in zip(out, made)), shaped

        said = jnp.concatenate([last, jnp.zeros_like(forced)], axis=1)
        out: tuple[jax.Array, ...] = (jnp.zeros(forced.shape, bool),) if how.formed else ()
        if how.logprobs:
            likeliest = (*forced.shape, min(TOP_LOGPROBS, self.cfg.vocab_size))
            out += (jnp.zeros(forced.shape), jnp.zeros(likeliest, jnp.int32), jnp.zeros(likeliest))
        if self.fused:  # kernels read and write the slots in place
            n_slots = cache[0][0].shape[1]
            places = jnp.arange(n_slots) if slots is None else jnp.minimum(slots.reshape(-1), n_slots - 1)
            rows = jax.tree.map(lambda c: c.reshape(c.shape[1:]), cache)
        else:
            places, rows = None, kv.take(cache, slots, span)
        rows, said, out, _ = jax.lax.fori_loop(0, n, one, (rows, said, out, shaped))
        out = (said[:, 2:], *out)
        if self.fused:
            return out, jax.tree.map(lambda c: c[None], rows)
        steps = jnp.arange(forced.shape[1])
        positions = position[:, None] + steps
        written = (position[:, None] >= 0) & (steps < n) & (positions < self.max_len)
        return out, kv.put(cache, slots, rows, jnp.where(written, positions, -1))


@functools.partial(jax.jit, static_argnums=0)
def _one_step(program: Program, params, cache, token, position, before):
    """Logits of the rows in use, 0 for others, and the rows of the cache afterwards."""
    rows = list(cache)
    logits = program.step(params, rows, jnp.arange(len(token)), token, position, before)
    return jnp.where(position[:, None] >= 0, logits, 0.0), rows


@functools.cache
def kernels_agree(cfg: GPTConfig, dtype: np.dtype, max_len: int) -> bool:
    """Whether a decode step by kernels gives on this device what the plain one gives, in two layers of this shape.

    Tried with one row and with several, of which one is empty, at the beginning and where the rings have wrapped.
    """
    cfg, rng, tolerance = replace(cfg, n_layer=2), np.random.default_rng(0), TOLERANCE[dtype.itemsize]
    graph, state = nnx.split(nnx.eval_shape(lambda: GPT(cfg, rngs=nnx.Rngs(0), dtype=dtype)))

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)

    params = jax.tree.map(lambda x: draw(x.shape), nnx.to_pure_dict(state))
    for position in (np.asarray(p, np.int32) for p in ([max_len - 1], [3, -1, max_len - 1])):
        shapes = [(len(position), cfg.n_kv_head, ring, cfg.head_dim) for ring in kv.ring_sizes(cfg, max_len)]
        cache = [tuple(draw(shape).astype(dtype) for _ in range(2)) for shape in shapes]
        token, before = rng.integers(0, cfg.vocab_size, (2, len(position))).astype(np.int32)

        def ask(fused, *rest):
            program = Program(graph, cfg, dtype, max_len, fused)
            found = _one_step(program, prepared(params, dtype, fused, False), *rest)
            return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]

        want = ask(False, cache, token, position, before)
        try:
            got = ask(True, cache, token, position, before)
        except Exception:  # no such kernel for this device
            return False
        if any(not np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) for a, b in zip(got, want, strict=True)):
            return False
    return True


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def prepared(params: dict, dtype, fused: bool, int8: bool) -> dict:
    """Parameters as an engine reads them: cast, joined for kernels, quantized."""
    params = cast_matrices(params, dtype)
    params = decode_kernels.joined(params) if fused else params
    return quantize(params) if int8 else params


program_of = functools.cache(Program)  # engines of a kind share what is compiled
