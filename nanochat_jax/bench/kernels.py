"""What a compiled train step makes a GPU do, kernel by kernel, and the least time that the chip needs for it.

    JAX_PLATFORMS=cpu python -m nanochat_jax.bench kernels --depth 24 --rows 16 --gpu h200 [--precision fp8]

The step is compiled for the GPU, which need not be here (`targets.py`), and the optimised program is read: of every
kernel the bytes that it must move and the FLOPs of its products. Its floor is the larger of the two over what the chip
reaches in practice. The sum is a prediction in which every kernel runs at its floor: a ranking of where time goes, and
no measurement. `bench train --profile` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax.bench.step import RecipeStep, add_shape, recipe_accumulation

ACCUMULATION = 2  # micro-batches of the compiled step

LAUNCH = 2e-6  # seconds between kernels
REACHED = 0.9  # of a memory's bandwidth, by a large copy
# part of the product's operand type -> FLOP/s that large products reach
PRODUCTS = {"h100": {"f8": 1300e12, "": 700e12}, "h200": {"f8": 1400e12, "": 780e12}, "a100": {"": 260e12}}
ATTENTION = {"h100": 500e12, "h200": 500e12, "a100": 170e12}  # of cuDNN's, forward and backward together

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(pred|[subf]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota", "while", "call"}
_SLICING = {"dynamic-slice", "slice", "gather"}


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, shape) of every array in the text of a type."""
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(type_)]


def size(type_: str) -> int:
    """Bytes of a type."""
    return sum(math.prod(dims) * _BYTES.get(kind, 1) for kind, dims in arrays(type_))


@dataclass
class Instruction:
    name: str
    type: str
    op: str
    operands: list[str]
    text: str

    def called(self, kind: str) -> str | None:
        found = re.search(rf"{kind}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


@dataclass
class Kernel:
    """One launch: what it moves, what it multiplies, and how often a step launches it."""

    name: str
    part: str
    times: int
    looped: bool  # whether it belongs to a micro-batch
    bytes: int
    flops: float = 0.0
    operand: str = ""  # type of its products' operands, "attention" for cuDNN's

    def floor(self, bandwidth: float, gpu: str) -> float:
        """Seconds of one launch at best."""
        rate = ATTENTION[gpu] if self.operand == "attention" else 0.0
        if self.flops and not rate:
            rate = next(r for part, r in PRODUCTS[gpu].items() if self.operand.startswith(part))
        return max(self.bytes / (REACHED * bandwidth), self.flops / rate if rate else 0.0) + LAUNCH


@dataclass
class Program:
    """The computations of an optimised HLO module, and its entry."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @classmethod
    def parse(cls, text: str) -> Program:
        program, name = cls(), None
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", line)
            if head:
                name = head.group(2)
                program.computations[name] = []
                program.entry = name if head.group(1) else program.entry
            elif line == "}":
                name = None
            elif name and (found := _INSTRUCTION.match(line)):
                args = found.group(4)
                operands = re.findall(r"%([\w.\-]+)", args[: args.find(")")])
                program.computations[name].append(
                    Instruction(found.group(1), found.group(2), found.group(3), operands, line)
                )
        return program

    def kernels(self, name: str | None = None, times: int = 1, looped: bool = False) -> Iterator[Kernel]:
        """Every launch of a computation, those in loops as often as they run."""
        body = self.computations[name or self.entry]
        types = {i.name: i.type for i in body}
        for i in body:
            if i.op == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.text)
                yield from self.kernels(i.called("body"), times * (int(count.group(1)) if count else 1), True)
            elif i.op in ("call", "async-start") and i.called("calls"):
                yield from self.kernels(i.called("calls"), times, looped)
            elif i.op not in _FREE and not i.op.endswith("-done"):
                yield self._kernel(i, types, times, looped)

    def _kernel(self, i: Instruction, types: dict[str, str], times: int, looped: bool) -> Kernel:
        inner = self.computations.get(i.called("calls") or "", [])
        if inner:
            moved = self._moved(i, inner, types)
        elif i.op in _SLICING:
            moved = 2 * size(i.type)
        else:
            moved = size(i.type) + sum(size(types[o]) for o in i.operands if o in types)
        kernel = Kernel(i.name, part_of(i, inner), times, looped, moved)
        if is_attention(i):
            kernel.flops, kernel.operand = attention_flops(i, types), "attention"
        elif "matmul" in i.text and i.op == "custom-call":
            kind, left = arrays(types[i.operands[0]])[0]
            kernel.flops, kernel.operand = product_flops(i, left, arrays(i.type)[0][1]), kind
        else:
            shapes = {j.name: arrays(j.type)[0] for j in inner if arrays(j.type)}
            for j in inner:
                if j.op == "dot":
                    kind, left = shapes[j.operands[0]]
                    kernel.flops += product_flops(j, left, shapes[j.name][1])
                    kernel.operand = kind
        return kernel

    @staticmethod
    def _moved(i: Instruction, inner: list[Instruction], types: dict[str, str]) -> int:
        """Bytes that a fusion reads and writes; of what it slices or updates in place, the slices alone."""
        users = defaultdict(list)
        for j in inner:
            for o in j.operands:
                users[o].append(j)
        total = 0
        for j in inner:
            if j.op == "parameter":
                place = int(re.search(r"parameter\((\d+)\)", j.text).group(1))
                used = users[j.name]
                whole = size(types.get(i.operands[place], j.type)) if place < len(i.operands) else size(j.type)
                if used and all(u.op in _SLICING and u.operands[0] == j.name for u in used):
                    whole = min(whole, sum(size(u.type) for u in used))
                if used and all(u.op in ("dynamic-update-slice", "scatter") and u.operands[0] == j.name for u in used):
                    whole = 0
                total += whole
        written = size(i.type)
        by_name = {j.name: j for j in inner}
        for j in inner:
            if j.op in ("dynamic-update-slice", "scatter"):
                update = by_name.get(j.operands[-1 if j.op == "scatter" else 1])
                if update is not None:
                    written = min(written, 2 * size(update.type))
        return total + written


def product_flops(i: Instruction, left: tuple[int, ...], out: tuple[int, ...]) -> float:
    """2 x the elements of the result x the length of what is summed over, of a dot or a cuBLAS call."""
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', i.text)
    over = [int(d) for d in re.findall(r"\d+", found.group(1))]
    return 2.0 * math.prod(out) * math.prod(left[d] for d in over)


def is_attention(i: Instruction) -> bool:
    """cuDNN's, or one of flash.py's kernels."""
    return i.op == "custom-call" and ("fmha" in i.text or "flash_window_" in i.scope)


def attention_flops(i: Instruction, types: dict[str, str]) -> float:
    """Of causal attention with its window, of pairs that are seen alone: 2 products forward, 5 backward by cuDNN; by
    flash.py 3 for dq and 4 for dk and dv, as both make the scores and their gradient anew."""
    shape = arrays(types[i.operands[0]])[0][1]  # (B, T, H, N)
    batch, time, heads, n = shape
    admitted = re.search(r'sliding_window_length"?:\s*"?(\d+)', i.text)
    before = re.search(r"flash_window_(\d+)", i.scope)
    w = min(int(before.group(1)) + 1 if before else int(admitted.group(1)) if admitted else 0, time) or time
    pairs = w * time - w * (w - 1) / 2
    kernel = re.search(r'name = "(flash_\w+)"', i.text)
    products = {"flash_dq": 3, "flash_dkv": 4}.get(kernel.group(1) if kernel else "", 5 if "Backward" in i.text else 2)
    return 2 * products * batch * heads * n * pairs


def part_of(i: Instruction, inner: Sequence[Instruction]) -> str:
    """Which part of the step a kernel belongs to, by the names of the scopes that it was traced in."""
    scopes = Counter(j.scope for j in (i, *inner) if j.scope)
    names = " ".join(scopes)
    product = any(j.op == "dot" for j in inner) or "matmul" in i.text and i.op == "custom-call"
    if is_attention(i):
        return "attention"
    for name in ("optimizer", "loss", "embedding", "attention"):
        if re.search(rf"[/(]{name}[/)]", names):
            return name
    if i.op.startswith(("all-", "reduce-scatter", "collective")):
        return "communication"
    return "products" if product else "elementwise"


def with_accumulation(kernels: Sequence[Kernel], count: int) -> list[Kernel]:
    """The kernels of a step that was compiled for ACCUMULATION micro-batches, as often as with `count` of them."""
    return [dataclasses.replace(k, times=k.times * count // ACCUMULATION) if k.looped else k for k in kernels]


def table(kernels: Sequence[Kernel], bandwidth: float, gpu: str) -> dict[str, dict]:
    """part -> launches, gigabytes, teraflops and the floor's seconds, of a whole step."""
    out: dict[str, dict] = {}
    for k in kernels:
        row = out.setdefault(k.part, {"launches": 0, "gb": 0.0, "tflop": 0.0, "seconds": 0.0})
        row["launches"] += k.times
        row["gb"] += k.times * k.bytes / 1e9
        row["tflop"] += k.times * k.flops / 1e12
        row["seconds"] += k.times * k.floor(bandwidth, gpu)
    return out


def compiled_text(args: argparse.Namespace) -> str:
    """The optimised program of the step for the GPU."""
    from nanochat_jax.config import MeshConfig
    from nanochat_jax.mesh import sharding
    from nanochat_jax.model import attention
    from nanochat_jax.planning import targets

    mesh = sharding.make_mesh(MeshConfig(), targets.devices(args.gpu))
    options = {name: getattr(args, name) for name in ("seq", "vocab", "pattern", "precision")}
    step = RecipeStep(args.depth, mesh, kind=args.gpu, **options)
    if args.attention:
        with targets.tracing(args.gpu):
            attention.choose(attention.shapes_of(step.cfg, args.seq, step.dtype), args.rows, Path(), args.attention)
    return step.lower(args.rows, ACCUMULATION).compile().as_text()


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m nanochat_jax.bench kernels", description=__doc__.split("\n\n")[0])
    add_shape(p, depth=24, rows=16, seq=2048, precision="bfloat16")
    p.add_argument("--accumulation", type=int, help="micro-batches of a step; default: as the recipe's batch wants")
    p.add_argument("--gpu", choices=sorted(PRODUCTS), default="h100")
    p.add_argument("--attention", choices=("cudnn", "flash", "blocks"), help="the backend; default: cudnn")
    p.add_argument("--top", type=int, default=12, help="how many of the longest kernels are named")
    p.add_argument("--hlo", help="a file of an optimised program, instead of compiling one")
    p.add_argument("--dump", help="write the optimised program there")
    args = p.parse_args(argv)
    from nanochat_jax.errors import UserError
    from nanochat_jax.planning import targets

    try:
        if args.hlo:
            with open(args.hlo, encoding="utf-8") as f:
                text = f.read()
        else:
            text = compiled_text(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.dump:
        with open(args.dump, "w", encoding="utf-8") as f:
            f.write(text)
    count = args.accumulation or recipe_accumulation(args.depth, args.rows, args.seq, args.vocab)
    kernels, bandwidth = with_accumulation(list(Program.parse(text).kernels()), count), targets.GPUS[args.gpu].bandwidth
    parts = table(kernels, bandwidth, args.gpu)
    seconds = sum(row["seconds"] for row in parts.values())
    tokens = count * args.rows * args.seq
    print(f"d{args.depth}, {count} x {args.rows} rows of {args.seq} on a {args.gpu}, every kernel at its floor")
    print(f"{'':14} {'launches':>8} {'GB':>8} {'TFLOP':>8} {'ms':>8} {'share':>6}")
    for name, row in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
        figures = f"{row['launches']:8} {row['gb']:8.2f} {row['tflop']:8.2f} {1e3 * row['seconds']:8.2f}"
        print(f"{name:14} {figures} {100 * row['seconds'] / seconds:5.1f}%")
    print(f"{'':14} {1e3 * seconds:.1f} ms, {tokens / seconds:,.0f} tokens/s at best")
    longest = sorted(kernels, key=lambda k: -k.times * k.floor(bandwidth, args.gpu))[: args.top]
    for k in longest:
        each = k.floor(bandwidth, args.gpu)
        print(f"  {k.part:12} {k.name:40} {k.times:4} x {1e6 * each:8.1f} us  {k.bytes / 1e6:9.1f} MB")
    print(
        json.dumps(
            {
                "depth": args.depth,
                "rows": args.rows,
                "precision": args.precision,
                "gpu": args.gpu,
                "parts": parts,
                "seconds": seconds,
            }
        )
    )
    return 0
