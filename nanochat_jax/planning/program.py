"""An optimised program (HLO) as kernels: the bytes that each must move, the FLOPs of its products, and the least time
that a chip needs for it: the larger of the two over what the chip reaches in practice.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nanochat_jax.planning import targets

ENTRY = "ENTRY"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

LAUNCH = 2e-6  # seconds between kernels
REACHED = 0.9  # of a memory's bandwidth, by a large copy
# FLOP/s that large products reach, by how the type of their operands begins, and cuDNN's attention, both ways together
RATES = {
    "rtx4090": {"attention": 110e12, "f8": 280e12, "": 145e12},  # from its peaks, not measured
    "h100": {"attention": 500e12, "f8": 1300e12, "": 700e12},
    "h200": {"attention": 500e12, "f8": 1400e12, "": 780e12},
    "a100": {"attention": 170e12, "": 260e12},
    "a100_80": {"attention": 170e12, "": 260e12},
}

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(pred|[subf]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota", "while", "call"}
_SLICING = {"dynamic-slice", "slice", "gather"}
_UPDATE = {"dynamic-update-slice": 1, "scatter": -1}  # written in place -> which operand holds what is written


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

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the text, or ""."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""

    def called(self, kind: str) -> str:
        return self.find(rf"{kind}=%?([\w.\-]+)")

    @property
    def collective(self) -> str:
        """Which collective it is or starts, or ""."""
        name = self.op.removesuffix("-start")
        return name if name in COLLECTIVES else ""

    @property
    def trips(self) -> int:
        """How often a loop runs."""
        return int(self.find(r'"known_trip_count":\{"n":"(\d+)"') or 1)

    @property
    def scope(self) -> str:
        return self.find(r'op_name="([^"]*)"')

    @property
    def is_product(self) -> bool:
        return "matmul" in self.text and self.op == "custom-call"

    @property
    def is_attention(self) -> bool:
        """cuDNN's."""
        return self.op == "custom-call" and "fmha" in self.text


@dataclass
class Kernel:
    """One launch: what it moves, what it multiplies, and how often a step launches it."""

    name: str
    part: str
    times: int
    bytes: int
    flops: float = 0.0
    operand: str = ""  # type of its products' operands, or "attention"

    def floor(self, gpu: str) -> float:
        """Seconds of one launch at best."""
        rate = next(rate for kind, rate in RATES[gpu].items() if self.operand.startswith(kind))
        return max(self.bytes / (REACHED * targets.GPUS[gpu].bandwidth), self.flops / rate) + LAUNCH


class Program:
    """The computations of an optimised HLO module by their names; the entry's is ENTRY."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        body: list[Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                body = self.computations[ENTRY if head[1] else head[2]] = []
            elif found := _INSTRUCTION.match(line):
                operands = re.findall(r"%([\w.\-]+)", found[4][: found[4].find(")")])
                body.append(Instruction(found[1], found[2], found[3], operands, line))

    def inner(self, i: Instruction) -> list[Instruction]:
        return self.computations.get(i.called("calls") or i.called("to_apply"), [])

    def kernels(self, name: str = ENTRY, times: int = 1) -> Iterator[Kernel]:
        """Every launch of a computation (the entry) but collectives, those in loops as often as they run."""
        body = self.computations[name]
        types = {i.name: i.type for i in body}
        for i in body:
            if i.op == "while":
                yield from self.kernels(i.called("body"), times * i.trips)
            elif i.op in ("call", "async-start") and i.called("calls"):
                yield from self.kernels(i.called("calls"), times)
            elif kernel := self.kernel(i, types):
                yield replace(kernel, times=times)

    def kernel(self, i: Instruction, types: dict[str, str]) -> Kernel | None:
        """The launch of an instruction, whose operands have `types`; None where it launches nothing or a collective."""
        if i.op in _FREE or i.collective or i.op.endswith("-done"):
            return None
        inner = self.computations.get(i.called("calls"), [])
        if inner:
            moved = fusion_bytes(i, inner, types)
        elif i.op in _SLICING:
            moved = 2 * size(i.type)
        else:
            moved = size(i.type) + sum(size(types[o]) for o in i.operands if o in types)
        kernel = Kernel(i.name, part_of(i, inner), 1, moved)
        if i.is_attention:
            kernel.flops, kernel.operand = attention_flops(i, types), "attention"
            return kernel
        products = [i] if i.is_product else [j for j in inner if j.op == "dot"]
        types = types if i.is_product else {j.name: j.type for j in inner}
        for j in products:
            kernel.operand, left = arrays(types[j.operands[0]])[0]
            kernel.flops += product_flops(j, left, arrays(j.type)[0][1])
        return kernel


def fusion_bytes(i: Instruction, inner: list[Instruction], types: dict[str, str]) -> int:
    """Bytes that a fusion reads and writes; of what it slices or updates in place, the slices alone."""
    users, by_name = defaultdict(list), {j.name: j for j in inner}
    for j in inner:
        for o in j.operands:
            users[o].append(j)
    read, written = 0, size(i.type)
    for j in inner:
        if j.op == "parameter":
            place = int(j.find(r"parameter\((\d+)\)"))
            used = users[j.name]
            first = bool(used) and all(u.operands[0] == j.name for u in used)
            whole = size(types.get(i.operands[place], j.type)) if place < len(i.operands) else size(j.type)
            if first and all(u.op in _SLICING for u in used):
                whole = min(whole, sum(size(u.type) for u in used))
            elif first and all(u.op in _UPDATE for u in used):
                whole = 0
            read += whole
        elif j.op in _UPDATE and (update := by_name.get(j.operands[_UPDATE[j.op]])):
            written = min(written, 2 * size(update.type))
    return read + written


def product_flops(i: Instruction, left: tuple[int, ...], out: tuple[int, ...]) -> float:
    """2 x the elements of the result x the length of what is summed over, of a dot or a cuBLAS call."""
    over = re.findall(r"\d+", i.find(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)'))
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in over)


def attention_flops(i: Instruction, types: dict[str, str]) -> float:
    """Of causal attention with its window, of pairs that are seen alone: 2 products forward, 5 backward."""
    batch, time, heads, n = arrays(types[i.operands[0]])[0][1]  # (B, T, H, N)
    window = int(i.find(r'sliding_window_length"?:\s*"?(\d+)') or 0)
    w = min(window, time) or time
    pairs = w * time - w * (w - 1) / 2
    products = 5 if "Backward" in i.text else 2
    return 2 * products * batch * heads * n * pairs


def part_of(i: Instruction, inner: Sequence[Instruction]) -> str:
    """Which part of the step a kernel belongs to, by the names of the scopes that it was traced in."""
    if i.is_attention:
        return "attention"
    scopes = " ".join(j.scope for j in (i, *inner))
    for name in ("optimizer", "loss", "embedding", "attention"):
        if re.search(rf"[/(]{name}[/)]", scopes):
            return name
    if i.op.startswith(COLLECTIVES):
        return "communication"
    return "products" if i.is_product or any(j.op == "dot" for j in inner) else "elementwise"
