"""The engine: prompts in, tokens out, many at a time, through a key/value cache.

A small operating system. A slot of the cache is a process's memory, the queue is what waits for one, and `step` is a
turn: it gives free slots to what waits, prefills a chunk of the prompts that are not in the cache yet, and decodes a
time slice for all that are. A slice is short while somebody waits and lasts about SLICE_SECONDS otherwise. In
`generate` nobody watches, and a slice is as long as makes the whole shortest.

A slot keeps what it holds when its request ends. A prompt that begins like it, as the next turn of a conversation does,
or like the prompt of a request beside it, as the samples of one question do, is prefilled from where they part.

The engine knows ids only: text, tools and HTTP are the callers'. A tool is a state machine that sees each token and may
answer with tokens to force; what was decoded past that point in the slice is thrown away, which costs nothing but its
time: the cache is addressed by position, and those positions are written again.

    engine = Engine(model, slots=8, max_len=model.cfg.sequence_len)
    [completion] = engine.generate([Request(ids, max_new_tokens=100, temperature=0.0, stop_ids=(end,))])
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from nanochat_jax import devices as chips
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import decode_kernels
from nanochat_jax.engine.programs import compiled, kernels_agree, prepared, program_of
from nanochat_jax.engine.sampling import TOP_LOGPROBS, Settings, mode
from nanochat_jax.mesh import sharding

SHORT, LONG = 8, 32  # tokens of a slice: while somebody waits, and at most
SLICE_SECONDS = 0.08  # how long a slice lasts where nobody waits
PATIENT_PARTS = 8  # slices of a usual answer where nobody watches: the last one's rest is then a small part of it
TRAFFIC_SECONDS = 1.0  # for so long after a request came beside others, another one is expected
PREFILL_TOKENS = 8192  # rows times chunk of one call, at most
PREFILL_BESIDE = 512  # the same while others decode: for so long they stand still
WORTH_SHARING = 16  # tokens of a common prefix that are worth a copy, or to wait for


class Shapes(NamedTuple):
    """What calls are compiled for: few shapes where a compilation takes long, many where it takes a second."""

    chunks: tuple[int, ...]  # tokens of a prompt that one call takes in: the smallest that holds all
    spans: tuple[int, ...]  # positions that a call looks at: one of these times a power of `factor`
    factor: int  # between widths as well


SHAPES = {"gpu": Shapes((32, kv.SLACK), (512,), 4), "other": Shapes((16, 64, kv.SLACK), (128, 192), 2)}


@dataclass(frozen=True)
class Request:
    """What to continue, and how. top_k 0 is all of them; temperature 0 is greedy.

    logprobs: -1 for none, n for those of the chosen tokens and of the n likeliest at each place, at most TOP_LOGPROBS.
    """

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int = -1


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's probabilities, before temperature and filters."""

    logprob: float  # of the token that was taken
    top: tuple[tuple[int, float], ...]  # (id, logprob) of the likeliest, in falling order


@dataclass
class Completion:
    ids: list[int] = field(default_factory=list)  # without the stop token
    mask: list[int] = field(default_factory=list)  # 0 where a tool forced the token, as long as ids
    finish_reason: str = ""  # stop | length | cancelled
    logprobs: list[TokenLogprob] = field(default_factory=list)  # as long as ids, where asked for


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine; compared by identity."""

    request: Request
    tool: object | None
    prompt: list[int]
    completion: Completion = field(default_factory=Completion)
    forced: deque = field(default_factory=deque)  # tokens that a tool wants next
    slot: Slot | None = None
    filled: int = 0  # ids of the prompt that are in the cache
    begun: bool = False  # what the cache held of the prompt has been looked for
    leader: Ticket | None = None  # begins with what this one begins with, and is being prefilled

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion.ids)

    @property
    def prefilling(self) -> bool:
        """The last id is not prefilled: it is what the first decode step takes in."""
        return self.filled < len(self.prompt) - 1

    @property
    def ready(self) -> bool:
        return self.begun and not self.prefilling

    def last(self, n: int) -> int:
        """The id at place -n of prompt and completion, or -1 where there is none."""
        if n <= len(self.completion.ids):
            return self.completion.ids[-n]
        n -= len(self.completion.ids)
        return self.prompt[-n] if n <= len(self.prompt) else -1


@dataclass(frozen=True)
class Event:
    """What one step did for a ticket: its new ids, and the completion if that was the end."""

    ticket: Ticket
    ids: list[int]
    completion: Completion | None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Counters:
    """Since the engine was made."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompts: found in the cache
    generated_tokens: int = 0
    answers: int = 0  # that came to their end
    answer_tokens: int = 0  # of these
    calls: int = 0  # of the device


@dataclass(eq=False)
class Slot:
    """A row of the cache, and what is in it."""

    device: int
    place: int  # among the slots of its device
    ids: list[int] = field(default_factory=list)  # the sequence whose keys and values it holds
    written: int = 0  # positions that were ever filled for it, thrown away ones included
    used: int = 0  # when it was last given to a request, counted in requests
    ticket: Ticket | None = None


# ----------------------------------------------------------------------------------------------- on the host


def _grown(n: int, smallest: int, largest: int, factor: int = 2) -> int:
    """n rounded up to smallest times a power of factor, at most largest: few shapes, few compilations."""
    size = smallest
    while size < n:
        size *= factor
    return min(size, largest)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


class Engine:
    """`slots` rows of at most `max_len` tokens each, split over the devices of the mesh where these divide them.

    One thread at a time may use it. tool: has start(), which gives a state machine with push(id) -> ids to force; None
    for none. int8: the blocks' matrices and the head are read as int8 (`quantize`). one_core: this is one of several
    engines on a CPU, each in a thread.
    """

    def __init__(
        self, model, *, slots: int, max_len: int, tool=None, mesh=None, int8: bool = False, one_core: bool = False
    ):
        if max_len > model.cfg.sequence_len:
            raise ValueError(f"max_len={max_len} is more than the model's context of {model.cfg.sequence_len}")
        self.slots, self.max_len, self.cfg, self._tool = slots, max_len, model.cfg, tool
        self._mesh, self._int8, self._compiled = mesh, int8, compiled(one_core)
        self._shapes = SHAPES.get(chips.platform(), SHAPES["other"])
        graph, state = nnx.split(model)
        dtype = np.dtype(model.dtype)
        is_fused = (mesh is None or mesh.size == 1) and decode_kernels.takes(model.cfg)
        if is_fused and not kernels_agree(model.cfg, dtype, max_len):
            print("decoding without kernels, which do not agree with plain formulas on this device", file=sys.stderr)
            is_fused = False
        self._program = program_of(graph, model.cfg, dtype, max_len, is_fused)
        devices = sharding.data_parallel(mesh) if mesh is not None else 1
        self._devices = devices if slots % devices == 0 else 1
        each = slots // self._devices
        self._cache = kv.make_cache(self.cfg, self._devices, each, max_len, model.dtype, mesh)
        self._safe = min(kv.ring_sizes(self.cfg, max_len))  # positions up to here have overwritten nothing
        self._slots = [Slot(d, s) for d in range(self._devices) for s in range(each)]
        self._queue: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._pace: dict[tuple, float] = {}  # seconds of a decoded position, by what was compiled
        self._given = 0  # requests that got a slot
        self._traffic = float("-inf")  # when a request last came beside others
        self.patient = False  # nobody watches the tokens as they come
        self.counters = Counters()
        self.update_params(nnx.to_pure_dict(state))

    def update_params(self, params: dict) -> None:
        """Goes on with other parameters, a nested dict; matrices are cast (or quantized) once, here."""
        if self._devices > 1:
            params = jax.device_put(params, sharding.tree_shardings(params, self._mesh))
        self.params = prepared(params, self._program.dtype, self._program.fused, self._int8)
        for slot in self._slots:
            slot.ids, slot.written = [], 0

    # ---------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> Ticket:
        """Queues a request. ValueError where its prompt is empty or leaves no room for a token."""
        if not 1 <= len(request.ids) < self.max_len:
            raise ValueError(f"a prompt of {len(request.ids)} tokens does not fit: 1 to {self.max_len - 1}")
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if not -1 <= request.logprobs <= TOP_LOGPROBS:
            raise ValueError(f"logprobs={request.logprobs} must be -1 to {TOP_LOGPROBS}")
        ticket = Ticket(request, self._tool.start() if self._tool else None, list(request.ids))
        self._queue.append(ticket)
        if self._running:
            self._traffic = time.perf_counter()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, wherever it is; the next step says so. Nothing where it has ended already."""
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif ticket in self._running:
            self._release(ticket)
        else:
            return
        ticket.completion.finish_reason = "cancelled"
        self._cancelled.append(ticket)

    @property
    def dtype(self) -> np.dtype:
        return self._program.dtype

    @property
    def arrays(self) -> tuple:
        """All that it keeps on the devices: parameters and cache."""
        return self.params, self._cache

    @property
    def busy(self) -> bool:
        """Something is queued, running, or yet to be reported."""
        return bool(self._queue or self._running or self._cancelled)

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All of them to their end, in order."""
        tickets = [self.submit(r) for r in requests]
        before, self.patient = self.patient, True
        try:
            while self.busy:
                self.step()
        finally:
            self.patient = before
        return [t.completion for t in tickets]

    def warm_up(self, request: Request) -> Iterator[None]:
        """Compiles, one program at each step of the iterator, what requests with such settings can come to need.

        To be gone through while there is nothing else to do: a request that needs a program that is not there yet
        waits for its compilation. Nothing is decoded and nothing in the cache changes.
        """
        each, how = self.slots // self._devices, mode([request], self.cfg.vocab_size)
        widths = sorted({_grown(n, 1, each, self._shapes.factor) for n in range(1, each + 1)})
        spans = sorted({self._span(n) for n in range(1, self.max_len + 1)})
        for width in widths:
            nowhere = np.full((self._devices, width), each, np.int32)
            self._cache = kv.copy(self._cache, nowhere, nowhere)
            yield
        for span, width in itertools.product(spans, widths):
            table = None if width == each else np.full((self._devices, width), each, np.int32)
            R = self._devices * width
            for chunk in self._shapes.chunks:
                zeros = np.zeros(R, np.int32)
                where = (table, np.zeros((R, chunk), np.int32), zeros - 1, zeros, zeros)
                self._cache = self._compiled.prefill(self._program, span, self.params, self._cache, *where)
                yield
            if self._program.fused and span != spans[0]:
                continue  # one program of a decode step serves all
            nothing = np.full((R, 2), -1, np.int32), np.full(R, -1, np.int32), np.full((R, LONG), -1, np.int32)
            what, reach = (table, *nothing, Settings.blank(R), 0), self._reach(span)
            self._cache = self._compiled.decode(self._program, reach, how, self.params, self._cache, *what)[1]
            yield

    # ------------------------------------------------------------------------------------------- a turn

    def step(self) -> list[Event]:
        """Admits what is queued while slots are free, prefills a chunk, decodes a slice, and says what came of it."""
        events = [Event(t, [], t.completion) for t in self._cancelled]
        self._cancelled.clear()
        self._admit()
        self._begin()
        beside = any(t.ready for t in self._running) and not self.patient
        self._prefill_some(PREFILL_BESIDE if beside else PREFILL_TOKENS)
        ready = [t for t in self._running if t.ready]
        return events + self._slice(ready) if ready else events

    # ------------------------------------------------------------------------------------------- slots

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.slots:
            ticket = self._queue.popleft()
            self.counters.prompt_tokens += len(ticket.prompt)
            self._place(ticket)
            self._running.append(ticket)

    def _reusable(self, slot: Slot, prompt: Sequence[int]) -> int:
        """From which position a sequence that begins with `prompt` may go on with what the slot holds."""
        n = _common(slot.ids, prompt)
        return n if slot.written <= self._safe or n >= slot.written - kv.SLACK else 0

    def _place(self, ticket: Ticket) -> None:
        """Gives a ticket the free slot that suits it best; it waits where a prompt that it shares is on its way."""
        prompt = ticket.prompt[:-1]
        free = [s for s in self._slots if s.ticket is None]
        # a slot that holds much more than the prompt begins with is worth keeping: its part is copied
        own = {s: n if 2 * n >= len(s.ids) else 0 for s in free for n in (self._reusable(s, prompt),)}
        busy = Counter(s.device for s in self._slots if s.ticket is not None)
        slot = max(free, key=lambda s: (own[s], -busy[s.device], -s.used))
        shared = {t: _common(t.prompt[:-1], prompt) for t in self._running if t.prefilling and t.leader is None}
        leader = max(shared, key=shared.get, default=None)
        if leader is not None and shared[leader] >= own[slot] + WORTH_SHARING:
            beside = [s for s in free if s.device == leader.slot.device]
            if beside:
                ticket.leader, slot = leader, min(beside, key=lambda s: s.used)
        self._given += 1
        slot.ticket, ticket.slot, slot.used = ticket, slot, self._given

    def _begin(self) -> None:
        """Has every prompt that does not wait for another begin with what its slot, or one beside it, holds of it."""
        copies: dict[Slot, Slot] = {}  # to -> from
        for t in self._running:
            if t.begun or (t.leader is not None and t.leader.slot is not None and t.leader.prefilling):
                continue
            slot, prompt = t.slot, t.prompt[:-1]
            kept = self._reusable(slot, prompt)
            if t.leader is not None and t.leader.slot is not None:
                others = [t.leader.slot]
            else:
                others = [s for s in self._slots if s.device == slot.device and s is not slot]
            best = max(others, key=lambda s: self._reusable(s, prompt), default=slot)
            if self._reusable(best, prompt) >= kept + WORTH_SHARING:
                copies[slot] = copies.get(best, best)  # all are read before one is written
                slot.written, kept = best.written, self._reusable(best, prompt)
            slot.ids, slot.written = prompt[:kept], slot.written if kept else 0
            t.filled, t.begun, t.leader = kept, True, None
            self.counters.reused_tokens += kept
        if copies:
            by_device = [[pair for pair in copies.items() if pair[0].device == d] for d in range(self._devices)]
            each = self.slots // self._devices
            M = self._width(max(map(len, by_device)))
            table = np.full((2, self._devices, M), each, np.int32)
            for d, pairs in enumerate(by_device):
                for m, (to, source) in enumerate(pairs):
                    table[:, d, m] = source.place, to.place
            self._cache = kv.copy(self._cache, table[0], table[1])
            self.counters.calls += 1

    def _span(self, n: int) -> int:
        """How many positions a call looks at that needs n."""
        return min(_grown(n, smallest, self.max_len, self._shapes.factor) for smallest in self._shapes.spans)

    def _reach(self, n: int) -> int:
        """The same of a decode step, whose kernels see for themselves how many they need: one program serves all."""
        return self.max_len if self._program.fused else self._span(n)

    def _release(self, ticket: Ticket) -> None:
        self._running.remove(ticket)
        ticket.slot.ticket = ticket.slot = None

    def _width(self, n: int) -> int:
        """Rows of each device in a call for n. Patient: in larger steps, as compiling costs more than spare rows."""
        return _grown(n, 1, self.slots // self._devices, 4 if self.patient else self._shapes.factor)

    def _rows(self, tickets: Sequence[Ticket]) -> tuple[np.ndarray | None, list[int]]:
        """The table of slots (D, M) for a call, None for all, and the row of each ticket in it."""
        by_device: list[list[Ticket]] = [[] for _ in range(self._devices)]
        for t in tickets:
            by_device[t.slot.device].append(t)
        each = self.slots // self._devices
        width = self._width(max(map(len, by_device)))
        if width == each:
            return None, [t.slot.device * each + t.slot.place for t in tickets]
        table, row = np.full((self._devices, width), each, np.int32), {}
        for d, group in enumerate(by_device):
            for m, t in enumerate(group):
                table[d, m], row[id(t)] = t.slot.place, d * width + m
        return table, [row[id(t)] for t in tickets]

    # ------------------------------------------------------------------------------------------- prefill

    def _prefill_some(self, limit: int) -> None:
        """One chunk of the oldest prompts that are not in the cache yet."""
        waiting = [t for t in self._running if t.begun and t.prefilling]
        if not waiting:
            return
        longest = max(len(t.prompt) - 1 - t.filled for t in waiting)
        # two short chunks are less work than a long one that is half empty, but one call more
        chunks = self._shapes.chunks
        chunk = next((c for c in chunks if (2 if self.patient else 1) * c >= longest), chunks[-1])
        tickets = waiting[: max(1, limit // chunk)]
        table, places = self._rows(tickets)
        n_rows = self.slots if table is None else table.size
        tokens = np.zeros((n_rows, chunk), np.int32)
        before, start, count = np.full(n_rows, -1, np.int32), np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
        for t, row in zip(tickets, places):
            piece = t.prompt[t.filled : min(len(t.prompt) - 1, t.filled + chunk)]
            tokens[row, : len(piece)] = piece
            start[row], count[row] = t.filled, len(piece)
            before[row] = t.prompt[t.filled - 1] if t.filled else -1
            t.filled += len(piece)
            t.slot.ids += piece
            t.slot.written = max(t.slot.written, t.filled)
        span = self._span(max(t.filled for t in tickets))
        self._cache = self._compiled.prefill(
            self._program, span, self.params, self._cache, table, tokens, before, start, count
        )
        self.counters.calls += 1

    # ------------------------------------------------------------------------------------------- decode

    def _slice(self, tickets: list[Ticket]) -> list[Event]:
        """Decodes the next few tokens of tickets whose prompts are in the cache."""
        table, places = self._rows(tickets)
        n_rows = self.slots if table is None else table.size
        last, position = np.full((n_rows, 2), -1, np.int32), np.full(n_rows, -1, np.int32)
        forced = np.full((n_rows, LONG), -1, np.int32)
        settings = Settings.blank(n_rows)
        last[:, 1] = 0
        for t, row in zip(tickets, places):
            last[row] = t.last(2), t.last(1)
            position[row] = t.length - 1
            ahead = list(t.forced)[:LONG]
            forced[row, : len(ahead)] = ahead
            settings.fill(row, t.request)
        how = mode([t.request for t in tickets], self.cfg.vocab_size)
        key = (n_rows, how)
        n = self._slice_length(tickets, key)
        reach = self._reach(int(position.max()) + n)
        began = time.perf_counter()
        out, self._cache = self._compiled.decode(
            self._program, reach, how, self.params, self._cache, table, last, position, forced, settings, n
        )
        out = [np.asarray(o) for o in out]
        self._pace[key] = (time.perf_counter() - began) / n
        self.counters.calls += 1
        events = []
        for t, row in zip(tickets, places):
            t.slot.written = max(t.slot.written, min(int(position[row]) + n, self.max_len))
            first = len(t.completion.ids)
            wanted = t.request.logprobs
            logprobs = _logprobs(wanted, *(o[row, :n] for o in out[1:])) if wanted >= 0 else []
            self._take(t, out[0][row, :n].tolist(), logprobs)
            new, done = t.completion.ids[first:], bool(t.completion.finish_reason)
            t.slot.ids = [*t.prompt, *t.completion.ids][: int(position[row]) + n]
            events.append(Event(t, new, t.completion if done else None, t.completion.logprobs[first:]))
            self.counters.generated_tokens += len(new)
            if done:
                self._release(t)
                self.counters.answers += 1
                self.counters.answer_tokens += len(t.completion.ids)
        return events

    def _slice_length(self, tickets: Sequence[Ticket], key: tuple) -> int:
        """Tokens of the next slice: short while somebody waits or may soon, about SLICE_SECONDS of them otherwise.

        Patient: a part of what answers were long so far, as the rest of an answer's last slice is lost.
        """
        n, now = SHORT, time.perf_counter()
        waits = self._queue or len(tickets) < len(self._running) or any(not t.completion.ids for t in tickets)
        if self.patient:
            usual = max(len(t.completion.ids) for t in tickets)
            if self.counters.answers:
                usual = self.counters.answer_tokens / self.counters.answers
            n = min(max(int(usual / PATIENT_PARTS), SHORT), LONG)
        elif key in self._pace and not waits and now > self._traffic + TRAFFIC_SECONDS:
            n = min(max(int(SLICE_SECONDS / self._pace[key]), SHORT), LONG)
        left = [min(t.request.max_new_tokens - len(t.completion.ids), self.max_len - t.length) for t in tickets]
        return min(n, max(left))

    def _take(self, ticket: Ticket, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Moves a ticket on by what was decoded for it, up to its end or to where a tool wants other tokens."""
        out, request = ticket.completion, ticket.request
        for i, id in enumerate(tokens):
            is_forced = bool(ticket.forced)
            if is_forced:
                ticket.forced.popleft()
            elif id in request.stop_ids:
                out.finish_reason = "stop"
                break
            out.ids.append(id)
            out.mask.append(int(not is_forced))
            out.logprobs += logprobs[i : i + 1]
            if len(out.ids) == request.max_new_tokens or ticket.length == self.max_len:
                out.finish_reason = "length"
                break
            wanted = ticket.tool.push(id) if ticket.tool and not is_forced else []
            if wanted:
                ticket.forced.extend(wanted)
                break


def _logprobs(n: int, chosen: np.ndarray, ids: np.ndarray, values: np.ndarray) -> list[TokenLogprob]:
    """Of a row's T tokens: logprobs (T,), ids and logprobs (T, TOP_LOGPROBS) of the likeliest; n of these are kept."""
    tops = [tuple(zip(i, v)) for i, v in zip(ids[:, :n].tolist(), values[:, :n].tolist())]
    return [TokenLogprob(p, top) for p, top in zip(chosen.tolist(), tops)]
