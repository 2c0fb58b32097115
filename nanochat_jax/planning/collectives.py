"""What crosses the links in a step on many GPUs, and how much of it the kernels beside it do not hide.

The compiled program is played through in its scheduled order on two clocks: kernels at their floors (program.py) on
one, collectives one after another on the other. A kernel waits for a collective where the program does; what it waits
is exposed. That a collective takes memory bandwidth and multiprocessors from the kernels beside it is not counted.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from nanochat_jax.planning import targets
from nanochat_jax.planning.program import ENTRY, Instruction, Kernel, Program, size

REACHED = 0.8  # of a link's rate, by large collectives
PCIE = 32e9  # bytes/s a direction of 16 lanes, version 4
INFINIBAND = 50e9  # of a card of 400 Gbit/s, one for each GPU
LATENCY = 10e-6  # seconds of a collective, however small: assumed


@dataclass(frozen=True)
class Links:
    """`count` GPUs, targets.HOST of them on a host. rate: bytes/s a direction of each to the others of its host."""

    count: int
    rate: float

    @classmethod
    def of(cls, gpu: str, count: int, pcie: bool = False):
        return cls(count, PCIE if pcie else targets.GPUS[gpu].link)

    def seconds(self, op: str, group: list[int], whole: float) -> float:
        """Of a collective over the devices of `group`, whose result (all-gather) or operand is `whole` bytes.

        Each device receives all but its share, an all-reduce twice: once to sum, once to hand round. Between hosts
        each card carries its part of what the host lacks, as NCCL's rings and trees do; an all-to-all has no such
        parts in common.
        """
        hosts = len({device // targets.HOST for device in group})
        n, each = len(group), len(group) // hosts
        received = whole * (1 if op == "collective-permute" else (n - 1) / n)
        if op == "all-to-all":
            between = whole * (n - each) / n
        else:
            between = whole * (hosts - 1) / hosts / each
        twice = 2 if op == "all-reduce" else 1
        slower = max((received - between) / self.rate, between / INFINIBAND)
        return LATENCY + twice * slower / REACHED


@dataclass
class Collective:
    """One collective: how often a step runs it, its bytes, seconds of each and those exposed.

    bytes: of the whole that it gathers or sums, on one device. beside: part of the step -> seconds of its kernels
    meanwhile."""

    name: str
    op: str
    times: int
    bytes: float
    seconds: float
    exposed: float = 0.0
    beside: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class _Clocks:
    """Plays one computation: `now` of the kernels, `link` of the collectives, `busy` what of now is kernels."""

    def __init__(self, program: Program, gpu: str, links: Links):
        self._program, self._gpu, self._links = program, gpu, links
        self.now, self.busy, self.link = 0.0, 0.0, 0.0
        self.found: list[Collective] = []
        self._pending: dict[str, tuple[Collective, float]] = {}  # by the start's name, with its end

    def play(self, name: str) -> None:
        body = self._program.computations[name]
        types = {i.name: i.type for i in body}
        for i in body:
            wrapped = next((j for j in self._program.inner(i) if j.collective), i) if i.op == "async-start" else i
            if wrapped.collective:
                inner = types if wrapped is i else {j.name: j.type for j in self._program.inner(i)}
                self._start(i.name, wrapped, inner)
            elif i.op.endswith("-done") and i.operands[0] in self._pending:
                self._wait(i.operands[0])
            elif i.op == "while":
                self._loop(i)
            elif i.op in ("call", "async-start") and i.called("calls"):
                self.play(i.called("calls"))
            elif kernel := self._program.kernel(i, types):
                self._run(kernel)

    def _run(self, kernel: Kernel) -> None:
        seconds = kernel.floor(self._gpu)
        self.now, self.busy = self.now + seconds, self.busy + seconds
        for collective, _ in self._pending.values():
            collective.beside[kernel.part] += seconds

    def _start(self, name: str, i: Instruction, types: dict[str, str]) -> None:
        group = first_group(i, self._links.count)
        held = sum(size(types[o]) for o in i.operands if o in types)
        op = i.collective
        whole = held * len(group) if op == "all-gather" else held
        collective = Collective(i.name, op, 1, whole, self._links.seconds(op, group, whole))
        self.link = max(self.now, self.link) + collective.seconds
        self._pending[name] = collective, self.link
        self.found.append(collective)
        if not i.op.endswith("-start") and name == i.name or '"is_sync":true' in i.text:
            self._wait(name)

    def _wait(self, name: str) -> None:
        collective, end = self._pending.pop(name)
        collective.exposed = max(0.0, end - self.now)
        self.now += collective.exposed

    def _loop(self, i: Instruction) -> None:
        inner = _Clocks(self._program, self._gpu, self._links)
        inner.play(i.called("body"))
        self.now, self.busy = self.now + i.trips * inner.now, self.busy + i.trips * inner.busy
        for collective in inner.found:
            collective.times *= i.trips
        self.found += inner.found


def first_group(i: Instruction, count: int) -> list[int]:
    """The devices of a collective's first group, of `count`; all groups run at the same time, on links of their own."""
    if listed := i.find(r"replica_groups=\{\{([\d,]+)\}"):
        return [int(n) for n in listed.split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.text):
        dims = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(found[1]), -1)[0].tolist()
    return list(range(count))


def play(program: Program, gpu: str, links: Links) -> tuple[float, list[Collective]]:
    """(seconds of the kernels of a step, its collectives)."""
    clocks = _Clocks(program, gpu, links)
    clocks.play(ENTRY)
    return clocks.busy, clocks.found


def exposed(found: list[Collective]) -> float:
    """Seconds of a step that kernels wait for links."""
    return sum(c.times * c.exposed for c in found)


def by_kind(found: list[Collective]) -> dict[str, dict]:
    """Collective and what it mostly runs beside -> how many a step has, gigabytes, milliseconds, those exposed."""
    kinds = defaultdict(list)
    for c in found:
        beside = max(c.beside, key=c.beside.__getitem__, default="nothing")
        kinds[f"{c.op} beside {beside}"].append(c)
    return {
        kind: {
            "number": sum(c.times for c in some),
            "GB": sum(c.times * c.bytes for c in some) / 1e9,
            "ms": 1e3 * sum(c.times * c.seconds for c in some),
            "exposed ms": 1e3 * exposed(some),
        }
        for kind, some in sorted(kinds.items(), key=lambda item: -exposed(item[1]))
    }
