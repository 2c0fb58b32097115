"""A decode step on a GPU in few launches: one position a row, for which a launch costs more than what it computes.

Pallas kernels that Triton compiles. `attend` takes the raw q, k, v of a step, does the rotation, the QK norm and
the value embedding, writes k and v into the cache in place and reads of the ring only what the window admits, in splits
over positions that `combine` puts together. `matvec` is the product of one row with a matrix of bfloat16 or int8, with
the norm before it and the activation, residual and scalars after it. `int8_product` is that of a few rows.

Every kernel has its plain form in model.py and cache.py, which is what other platforms and several devices run.

Shapes: M rows, S slots, H query heads, K key/value heads, R places of a ring, N head size, D width, O outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from nanochat_jax import devices
from nanochat_jax.config import GPTConfig
from nanochat_jax.kernels.fused import rms_norm, rotate_and_norm
from nanochat_jax.kernels.launch import launch
from nanochat_jax.model.gpt import GPT, merge, product, rotary_tables
from nanochat_jax.model.quantize import Int8, dequantize

_WHOLE = pl.no_block_spec  # of an array that a kernel gets whole, to read where it wants
_MASKED = -1e30  # finite: what is not seen at all then weighs 0 and not NaN
PAD = 64  # rows of the joined matrix that end with a gate are a multiple of it
PART = 64  # positions of a program of `attend`, at least
PROGRAMS = 1024  # of one call of it: some eight for each multiprocessor of an H100, so that reads overlap


def splits(seen: int, rows: int, heads: int) -> int:
    """Into how many parts the positions before the newest are split, at most `seen` of them."""
    return max(1, min(pl.cdiv(seen, PART), PROGRAMS // (rows * heads)))


def _rotated(ref, row, first, cos, sin, gain, eps):
    """Both halves (N/2,) of a head from column `first` of ref (M, ...), as `rotate_and_norm` gives them."""
    half = cos.shape[0]
    a, b = (ref[row, pl.ds(first + i * half, half)].astype(jnp.float32) for i in (0, 1))
    gain = gain * lax.rsqrt(jnp.sum(a * a + b * b) / (2 * half) + eps)
    a, b = a * gain, b * gain
    return a * cos + b * sin, b * cos - a * sin


def _is_slow(half):
    """`attention.is_offset`, of either half (N/2,) of a head."""
    return lax.iota(jnp.int32, half) >= half // 2


def _keys_of(keys, at, head, position, ring, offset):
    """Both halves (n, N/2) of the keys at positions (n, 1); offset: half of each from the position before."""
    half = keys.shape[-1] // 2
    place, columns, slow = lax.rem(position, ring), lax.iota(jnp.int32, half)[None], _is_slow(half)[None]
    if offset:
        place = jnp.where(slow, lax.rem(jnp.maximum(position - 1, 0), ring), place)
    tiles = [keys[at, head, place, columns + side] for side in (0, half)]
    return [jnp.where(slow & (position == 0), 0, tile) for tile in tiles] if offset else tiles


def _joined(a, b, tops, totals):
    """Softmaxes beside each other as one: both halves (N/2,) of the result, and the logarithm of the sum.

    a, b (n, N/2): sums of weighted values, of weights below exp(tops (n,)); totals (n,) of the weights.
    """
    top = jnp.max(tops)
    weight = jnp.exp(tops - top)
    total = jnp.sum(totals * weight)
    floored = jnp.maximum(total, 1e-30)
    halves = (jnp.sum(x * weight[:, None], axis=0) / floored for x in (a, b))
    return *halves, jnp.where(total > 0, top + jnp.log(floored), _MASKED)


def _attend(
    position, slot, token, cos, sin, qkv, table, keys, values, *outs, H, K, N, ring, window, part, gain, eps, offset
):
    """Program (s, k, m): part s - 1 of the positions that row m sees before its newest; s = 0: the newest itself."""
    out, lse, new_keys, new_values = outs
    s, head, row = (pl.program_id(i) for i in range(3))
    G, half = H // K, N // 2
    block = max(8, 32 // pl.next_power_of_2(G))  # positions that are read at once: as registers allow
    p, at = position[row], slot[row]
    cos, sin = (t[jnp.maximum(p, 0), :] for t in (cos, sin))

    def query(g):
        return (x * N**-0.5 for x in _rotated(qkv, row, (head * G + g) * N, cos, sin, gain, eps))

    @pl.when(s == 0)
    def _newest():
        ka, kb = (x.astype(keys.dtype) for x in _rotated(qkv, row, (H + head) * N, cos, sin, gain, eps))
        v = qkv[row, pl.ds((H + K + head) * N, N)].astype(jnp.float32)
        if table is not None:
            gate = 3.0 / (1.0 + jnp.exp(-qkv[row, (H + 2 * K) * N + head].astype(jnp.float32)))
            id = jnp.clip(token[row], 0, table.shape[0] - 1)
            v = v + gate * table[id, pl.ds(head * N, N)].astype(jnp.float32)
        v = v.astype(values.dtype)

        @pl.when(p >= 0)
        def _write():
            place = lax.rem(p, ring)
            new_keys[at, head, place, pl.ds(0, half)] = ka
            new_keys[at, head, place, pl.ds(half, half)] = kb
            new_values[at, head, place, :] = v

        if offset:  # the cache has keys as they are; half of what is seen is that of the position before
            before = lax.rem(jnp.maximum(p - 1, 0), ring)
            old = (keys[at, head, before, pl.ds(side, half)] for side in (0, half))
            ka, kb = (jnp.where(_is_slow(half), jnp.where(p > 0, x, 0), y) for x, y in zip(old, (ka, kb)))

        for g in range(G):
            qa, qb = query(g)
            score = jnp.sum(qa * ka.astype(jnp.float32) + qb * kb.astype(jnp.float32))
            out[0, row, head * G + g, :] = v.astype(jnp.float32)
            lse[0, row, head * G + g] = jnp.where(p >= 0, score, _MASKED)

    @pl.when(s > 0)
    def _before():
        queries = [tuple(query(g)) for g in range(G)]
        seen = jnp.minimum(p, window)  # ages 1 .. seen are before the newest, and in the cache
        first = (s - 1) * part + 1
        last = jnp.minimum(seen, first + part - 1)
        left = lax.iota(jnp.int32, half)[None]

        def ages(j):
            return first + j * block + lax.iota(jnp.int32, block)

        def read(j):
            there = (p - jnp.minimum(ages(j), last))[:, None]
            values_there = (values[at, head, lax.rem(there, ring), left + side] for side in (0, half))
            return *_keys_of(keys, at, head, there, ring, offset), *values_there

        def visit(j, carry):
            tiles, states = carry
            inside, ahead, after = ages(j) <= last, read(j + 1), []
            ka, kb, va, vb = (tile.astype(jnp.float32) for tile in tiles)
            for (qa, qb), (a, b, top, total) in zip(queries, states):
                score = jnp.sum(ka * qa[None] + kb * qb[None], axis=1)
                new_top = jnp.maximum(top, jnp.where(inside, score, _MASKED))
                weight, keep = jnp.where(inside, jnp.exp(score - new_top), 0.0), jnp.exp(top - new_top)
                a, b = (x * keep[:, None] + weight[:, None] * v for x, v in ((a, va), (b, vb)))
                after.append((a, b, new_top, total * keep + weight))
            return ahead, tuple(after)

        # each of the `block` places has a softmax of its own, and they are joined when all is read: what is in the loop
        # stays within a warp, where no barrier has loads wait, and the next tiles are on their way meanwhile
        none = (jnp.zeros((block, half), jnp.float32),) * 2
        none += jnp.full(block, _MASKED, jnp.float32), jnp.zeros(block, jnp.float32)
        blocks = lax.div(jnp.maximum(last - first + 1, 0) + block - 1, block)
        _, found = lax.fori_loop(0, blocks, visit, (read(0), (none,) * G))
        for g, parts in enumerate(found):
            *halves, lse[s, row, head * G + g] = _joined(*parts)
            for x, side in zip(halves, (0, half)):
                out[s, row, head * G + g, pl.ds(side, half)] = x


def _combine(out, lse, o, *, parts, padded):
    """Program (h, m)."""
    head, row = pl.program_id(0), pl.program_id(1)
    s = lax.iota(jnp.int32, padded)
    inside, at = s < parts, jnp.minimum(s, parts - 1)
    score = jnp.where(inside, lse[at, row, head], _MASKED)
    weight = jnp.where(inside, jnp.exp(score - jnp.max(score)), 0.0)
    columns = lax.iota(jnp.int32, o.shape[-1])
    total = jnp.sum(weight[:, None] * out[at[:, None], row, head, columns[None]], axis=0)
    o[row, head, :] = (total / jnp.sum(weight)).astype(o.dtype)


@functools.partial(jax.jit, static_argnames=("heads", "window", "gain", "eps", "offset"))
def attend(qkv, keys, values, position, slot, rope, *, heads, window, gain, eps, value_embed=None, offset=False):
    """What one position of M rows sees, through the cache: (M, H * N), and keys and values with the new ones in them.

    qkv (M, >= (H + 2 K) N): raw products, behind which the K gates' stand where there is a value_embed, (tokens (M,),
    table (V, K N)). keys, values (S, K, R, N) are written in place, at the positions (M,) of the slots (M,), all below
    S; a negative position writes and sees nothing. rope: cos and sin (positions, N/2), of all that there can be.
    offset: see `cache.attend`.
    """
    M, (_, K, R, N), H = len(qkv), keys.shape, heads
    seen = min(window, R - 1)
    parts = splits(seen, M, K)
    part = pl.cdiv(pl.cdiv(seen, parts), PART) * PART
    parts = pl.cdiv(seen, part) + 1
    tokens, table = value_embed or (position, None)
    sizes = {"H": H, "K": K, "N": N, "ring": R, "window": window, "part": part}
    kernel = functools.partial(_attend, **sizes, gain=gain, eps=eps, offset=offset)
    args = (position, slot, tokens, *rope, qkv, table, keys, values)
    n_arrays = len(jax.tree.leaves(args))  # without a table that is not there
    results = [((parts, M, H, N), jnp.float32), ((parts, M, H), jnp.float32)]
    results += [(cache.shape, cache.dtype) for cache in (keys, values)]
    inputs, outputs = [(x, _WHOLE) for x in args], [(_WHOLE, *result) for result in results]
    in_place = {n_arrays - 2: 2, n_arrays - 1: 3}
    with jax.named_scope(f"decode_window_{window}"):
        out, lse, keys, values = launch(kernel, (parts, K, M), inputs, outputs, warps=4, input_output_aliases=in_place)
        combine = functools.partial(_combine, parts=parts, padded=pl.next_power_of_2(parts))
        output = (_WHOLE, (M, H, N), qkv.dtype)
        [o] = launch(combine, (H, M), [(out, _WHOLE), (lse, _WHOLE)], [output], warps=2)
    return o.reshape(M, H * N), keys, values


def _chunk(n: int) -> int:
    """The largest power of two that divides n, at most 1024."""
    return math.gcd(n, 1024)


def _reads(width: int) -> bool:
    """Whether `matvec` reads matrices of this many columns well."""
    return _chunk(width) >= 64


def _matvec(x, weight, scale, residual, mix, out, *mixed, norm, square):
    O, D = weight.shape
    step = _chunk(D)

    def visit(j, carry):
        acc, squares = carry
        columns = pl.ds(j * step, step)
        piece = x[columns].astype(jnp.float32)
        acc = acc + weight[:, columns].astype(jnp.float32) * piece[None]
        return acc, squares + piece * piece if norm is not None else squares

    carry = jnp.zeros((O, step), jnp.float32), jnp.zeros(step, jnp.float32)
    if D // step <= 16:  # unrolled: all loads are then on their way at once
        for j in range(D // step):
            carry = visit(j, carry)
    else:
        carry = lax.fori_loop(0, D // step, visit, carry)
    y = jnp.sum(carry[0], axis=1)
    if norm is not None:
        y = y * lax.rsqrt(jnp.sum(carry[1]) / D + norm)
    if scale is not None:
        y = y * scale[:]
    if square:
        y = jnp.square(jnp.maximum(y, 0.0))
    if residual is not None:
        y = y + residual[:].astype(jnp.float32)
    out[:] = y.astype(out.dtype)
    if mix is not None:
        x0, factors = mix
        mixed[0][:] = (factors[0] * y + factors[1] * x0[:].astype(jnp.float32)).astype(out.dtype)


@functools.partial(jax.jit, static_argnames=("norm", "square"))
def matvec(x, weight, scale=None, *, norm=None, square=False, residual=None, mix=None):
    """x (1, D) times weight (O, D), transposed: (1, O) in x's dtype.

    norm: the epsilon of an RMS norm of x before it. scale (O, 1): of the rows of an int8 weight. square: relu(y)^2.
    residual (1, O) is added. mix (x0 (1, O), factors (2,)) also gives a second result, factors[0] of the first and
    factors[1] of x0.
    """
    O, D = weight.shape
    # a warp takes 256 columns at a time, 16 bytes a thread: x then stands in the registers as the weights do, and none
    # of it goes through shared memory, whose barriers would have every load wait for the one before
    warps = max(1, _chunk(D) // 256)
    tile = math.gcd(O, 2 if O < 2048 else 4)
    whole = pl.BlockSpec((None, D), lambda i: (0, 0))
    rows = pl.BlockSpec((tile, D), lambda i: (i, 0))
    own = pl.BlockSpec((None, tile), lambda i: (0, i))
    scale = None if scale is None else scale.reshape(1, O)
    inputs = [(x, whole), (weight, rows), (scale, own), (residual, own), (mix, (own, _WHOLE))]
    outputs = [(own, (1, O), x.dtype)] * (1 if mix is None else 2)
    out = launch(functools.partial(_matvec, norm=norm, square=square), (O // tile,), inputs, outputs, warps=warps)
    return out[0] if mix is None else out


OUTPUTS, COLUMNS, ROWS = 64, 128, 64  # of a program of `int8_product`, and of its loop's step; rows, at most


def _int8_product(x, weight, out, *, steps):
    first, M = pl.program_id(1) * steps * COLUMNS, x.shape[0]
    rows = jnp.minimum(lax.iota(jnp.int32, max(16, pl.next_power_of_2(M))), M - 1)  # those beyond are the last again
    outputs = pl.program_id(0) * OUTPUTS + lax.iota(jnp.int32, OUTPUTS)

    def visit(j, acc):
        columns = first + j * COLUMNS + lax.iota(jnp.int32, COLUMNS)
        a, b = x[rows[:, None], columns[None]], weight[outputs[:, None], columns[None]].astype(x.dtype)
        return acc + lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    acc = lax.fori_loop(0, steps, visit, jnp.zeros((len(rows), OUTPUTS), jnp.float32))
    out[pl.program_id(1), rows[:, None], outputs[None]] = acc


@jax.jit
def int8_product(x, values):
    """x (M, D), of at most ROWS rows, times int8 values (O, D), transposed: (M, O) in float32.

    cuBLAS takes no such pair: XLA would write the values out in 16 bits in every step, four times the bytes.
    """
    (M, D), O = x.shape, len(values)
    steps = D // COLUMNS
    parts = next(n for n in range(1, steps + 1) if steps % n == 0 and (n == steps or n * O >= PROGRAMS * 8))
    kernel, inputs = functools.partial(_int8_product, steps=steps // parts), [(x, _WHOLE), (values, _WHOLE)]
    output = (_WHOLE, (parts, M, O), jnp.float32)
    [out] = launch(kernel, (O // OUTPUTS, parts), inputs, [output], warps=4, stages=4)
    return out.sum(axis=0)  # XLA joins it with what comes next


# ------------------------------------------------------------------------------------------ the model's step


def takes(cfg: GPTConfig) -> bool:
    """Whether a model's decode steps are made of kernels on the platform that programs are traced for."""
    power_of_two = cfg.head_dim & (cfg.head_dim - 1) == 0
    return devices.platform() == "gpu" and power_of_two and cfg.head_dim >= 32


def joined(params: dict) -> dict:
    """The nested dict with one matrix `qkv` (O, D) in each block's attention, the gate's rows last, filled with 0.

    And `factors`, where the model has them: of each layer, those of the residual stream and of its beginning, (2,).
    """

    def join(attn):
        if "qkv" in attn:
            return attn
        parts = [attn[name]["weight"] for name in ("q", "k", "v")]
        if "ve_gate" in attn:
            gate = attn["ve_gate"]["weight"]
            parts.append(jnp.pad(gate, ((0, -len(gate) % PAD), (0, parts[0].shape[1] - gate.shape[1]))))
        return {"qkv": {"weight": jnp.concatenate(parts)}, "proj": attn["proj"]}

    blocks = {i: {**block, "attn": join(block["attn"])} for i, block in params["blocks"].items()}
    params = {**params, "blocks": blocks}
    if "resid_scalars" in params:
        params["factors"] = list(jnp.stack([params["resid_scalars"], params["x0_scalars"]], axis=1))
    return params


def model(graph, cfg: GPTConfig, params: dict, dtype) -> GPT:
    """The model of joined parameters, whose layers multiply by the joined matrix: XLA would put its parts together."""
    params = dequantize(params, dtype)
    blocks = {}
    for i, block in params["blocks"].items():  # q, k, v and gate are asked for, and never read
        names = ["q", "k", "v", "proj", *["ve_gate"] * cfg.has_value_embed(int(i))]
        blocks[i] = {**block, "attn": dict.fromkeys(names, block["attn"]["proj"])}
    model = merge(graph, {name: p for name, p in params.items() if name != "factors"} | {"blocks": blocks})
    for block, joint in zip(model.blocks, _in_order(params["blocks"])):
        block.attn = functools.partial(_attention, cfg, joint["attn"])  # type: ignore[assignment]  # it is called alike
    return model


def _attention(cfg: GPTConfig, params: dict, x, rope, attend, value_embed=None):
    """`model.Attention` of joined parameters: x (B, T, D) -> (B, T, D)."""
    (B, T, D), kv, N = x.shape, cfg.n_kv_head * cfg.head_dim, cfg.head_dim
    q, k, v, gate = jnp.split(product(x, params["qkv"]["weight"]), [D, D + kv, D + 2 * kv], axis=-1)
    q, k, v = (y.reshape(B, T, -1, N) for y in (q, k, v))
    if value_embed is not None:
        v = v + 3.0 * jax.nn.sigmoid(gate[..., : cfg.n_kv_head, None]) * value_embed.reshape(v.shape)
    q, k = (rotate_and_norm(y, rope, cfg.qk_gain, cfg.norm_eps) for y in (q, k))
    return product(attend(q, k, v).reshape(B, T, D), params["proj"]["weight"])


def _in_order(blocks: dict) -> list[dict]:
    return [blocks[i] for i in sorted(blocks, key=int)]


def dense(x, weight, *, norm=None, square=False, residual=None, mix=None):
    """x (M, D) times weight (O, D), an array or Int8, transposed: (M, O), with what `matvec` has."""
    values, scale = weight if isinstance(weight, Int8) else (weight, None)
    if len(x) == 1 and _reads(values.shape[1]):
        return matvec(x, values, scale, norm=norm, square=square, residual=residual, mix=mix)
    x = x if norm is None else rms_norm(x, norm)
    if scale is None:
        y = product(x, values)
    elif len(x) <= ROWS and values.shape[0] % OUTPUTS == 0 and values.shape[1] % COLUMNS == 0:
        y = (int8_product(x, values) * scale[:, 0]).astype(x.dtype)
    else:
        y = (product(x, values.astype(x.dtype)) * scale[:, 0]).astype(x.dtype)
    if square:
        y = jnp.square(jax.nn.relu(y))
    if residual is not None:
        y = residual + y
    if mix is None:
        return y
    return y, mixture(y, *mix)


def mixture(x, x0, factors):
    r, s = factors.astype(x.dtype)
    return r * x + s * x0


def step(model: GPT, params: dict, cache: list, slots, max_len: int, token, position, before):
    """Logits (M, V), before the softcap, of tokens (M,) at positions (M,), negative for an unused row, in slots (M,) of
    the cache.

    cache: a list of keys and values (S, K, R, N) per layer, in which the new ones are put. before (M,): the tokens left
    of these.
    """
    cfg, eps = model.cfg, model.cfg.norm_eps
    rope = tuple(t[:, 0] for t in rotary_tables(jnp.arange(max_len), cfg.head_dim, cfg.rope_base))
    x = model.embed(token[:, None])
    x = model._smear(x, before) if cfg.smear else x
    x = (x + model._bigrams(token[:, None], before) if cfg.bigram_rows else x)[:, 0]
    x0 = kept = x
    if cfg.residual_scalars:
        x = mixture(x, x0, params["factors"][0])
    blocks = _in_order(params["blocks"])
    for i, block in enumerate(blocks):
        attn, mlp = block["attn"], block["mlp"]
        qkv = dense(x, attn["qkv"]["weight"], norm=eps)
        value = None
        if cfg.has_value_table(i):
            value = token, params["value_embeds"][str(i)]["embedding"]
        elif cfg.reads_head(i):
            value = jnp.arange(len(token)), model.value_embed(i, token)
        how = {"heads": cfg.n_head, "window": cfg.windows[i], "gain": cfg.qk_gain, "eps": eps, "offset": cfg.key_offset}
        seen, *written = attend(qkv, *cache[i], position, slots, rope, **how, value_embed=value)
        cache[i] = tuple(written)
        x = dense(seen, attn["proj"]["weight"], residual=x)
        wide = dense(x, mlp["fc"]["weight"], norm=eps, square=True)
        mix = (x0, params["factors"][i + 1]) if cfg.residual_scalars and i + 1 < len(blocks) else None
        last = dense(wide, mlp["proj"]["weight"], residual=x, mix=mix)
        full, x = last if mix else (last, last)
        if i == cfg.n_layer // 2:
            kept = full
    if cfg.backout:
        x = x - model.backout_lambda[...].astype(x.dtype) * kept
    hidden = rms_norm(x, eps)
    return dense(hidden, params["lm_head"]["weight"])[:, : cfg.vocab_size].astype(jnp.float32)
