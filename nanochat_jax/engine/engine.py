"""The engine: prompts in, tokens out, many at a time, through a key/value cache.

A request is like a process, a slot of the cache its memory, and `step` a turn of the scheduler:

    admit    requests in the queue get free slots
    reuse    a prompt that begins like what a slot holds is prefilled only from where the two part
    prefill  a chunk of the prompts that are not in the cache yet is computed
    decode   requests whose prompts are in the cache get a time slice of a few tokens

A slot keeps what it holds when its request ends: the next turn of a conversation reuses the turns before it. Requests
that share a prompt, as the samples of one question do, compute it once: the others wait for the first.

A tool is a state machine that sees each token and may answer with tokens to force. What was decoded past that point in
the slice is thrown away: the cache is addressed by position, and those positions are written again.
"""

import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from nanochat_jax import devices as chips
from nanochat_jax.engine import cache as kv
from nanochat_jax.engine import decode_kernels
from nanochat_jax.engine.cache import Slot
from nanochat_jax.engine.programs import Shapes, abstract, kernels_agree, prepared, program_of
from nanochat_jax.engine.sampling import Allowed, Mode, Request, Settings, Shaped, TokenLogprob, mode
from nanochat_jax.mesh import sharding

SHORT, LONG = 8, 32  # tokens of a time slice: while requests wait, and at most
SLICE_SECONDS = 0.08  # of a slice while none waits
PATIENT_PARTS = 8  # slices of a usual answer in patient mode: this bounds what the last slice wastes
TRAFFIC_SECONDS = 1.0  # after requests came together, short slices for so long: more are expected
PREFILL_TOKENS = 8192  # rows times chunk of one prefill call, at most
PREFILL_BESIDE = 512  # the same while others decode, which stall meanwhile
WORTH_SHARING = 16  # tokens of a common prefix that are worth a copy, or to wait for


@dataclass
class Completion:
    ids: list[int] = field(default_factory=list)  # without the stop token
    mask: list[int] = field(default_factory=list)  # 0 where a tool forced the token, as long as ids
    finish_reason: str = ""  # stop | length | cancelled, or why its grammar could not be kept to
    logprobs: list[TokenLogprob] = field(default_factory=list)  # as long as ids, where asked for


@dataclass(eq=False)
class Ticket:
    request: Request
    tool: Any  # its state machine, with push(id) -> ids to force; or None
    prompt: list[int]
    form: Any = None  # where it stands in the grammar that it keeps to, a `grammar.Form`
    completion: Completion = field(default_factory=Completion)
    forced: deque[int] = field(default_factory=deque)  # tokens that the tool wants next
    run: float = SHORT  # ids that a slice brings, where a grammar throws away what does not fit
    filled: int = -1  # ids of the prompt that are in the cache; -1: not yet compared with what the cache holds
    leader: "Ticket | None" = None  # its prompt begins the same and is being prefilled: this one waits

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion.ids)

    @property
    def ready(self) -> bool:
        """It can decode. The last id of the prompt is not prefilled: the first decode step takes it in."""
        return self.filled >= len(self.prompt) - 1


@dataclass(frozen=True)
class Event:
    """What one step did for a ticket: its new ids, and the completion if that was the end."""

    ticket: Ticket
    ids: list[int]
    completion: Completion | None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Counters:
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompts: found in the cache
    generated_tokens: int = 0
    answers: int = 0  # that came to their end
    answer_tokens: int = 0  # of these
    calls: int = 0  # of the device


class Engine:
    """`slots` rows of at most `max_len` tokens each, split over the devices of the mesh where these divide them.

        engine = Engine(model, slots=8, max_len=model.cfg.sequence_len)
        [completion] = engine.generate([Request(ids, max_new_tokens=100, temperature=0.0, stop_ids=(end,))])

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
        self._mesh, self._int8 = mesh, int8
        graph, state = nnx.split(model)
        self.dtype = np.dtype(model.dtype)
        is_fused = (mesh is None or mesh.size == 1) and decode_kernels.takes(model.cfg)
        if is_fused and not kernels_agree(model.cfg, self.dtype, max_len):
            print("decoding without kernels, which do not agree with plain formulas on this device", file=sys.stderr)
            is_fused = False
        self._program = program_of(graph, model.cfg, self.dtype, max_len, is_fused, one_core)
        devices = sharding.data_parallel(mesh) if mesh is not None else 1
        self._devices = devices if slots % devices == 0 else 1
        self._each = slots // self._devices  # slots of a device
        self._shapes = Shapes.of(chips.platform(), self._each, max_len)
        self._cache = kv.make_cache(self.cfg, self._devices, self._each, max_len, model.dtype, mesh)
        self._safe = min(kv.ring_sizes(self.cfg, max_len))  # positions up to here have overwritten nothing
        self._slots = [Slot(d, s) for d in range(self._devices) for s in range(self._each)]
        self._queue: deque[Ticket] = deque()
        self._running: dict[Ticket, Slot] = {}  # the oldest first
        self._cancelled: list[Ticket] = []  # to be reported by the next step
        self._pace: dict[tuple, float] = {}  # seconds of a decoded position, by what was compiled
        self._admitted = 0  # requests so far
        self._traffic = float("-inf")  # when a request last came beside others
        self.patient = False  # throughput counts, not latency: nobody reads the tokens as they come
        self.counters = Counters()
        self.update_params(nnx.to_pure_dict(state))

    def update_params(self, params: dict) -> None:
        """Continues with other parameters, a nested dict; matrices are cast (or quantized) once, here."""
        if self._devices > 1:
            params = jax.device_put(params, sharding.tree_shardings(params, self._mesh))
        self.params = prepared(params, self.dtype, self._program.fused, self._int8)
        for slot in self._slots:
            slot.ids, slot.written = [], 0

    # ---------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> Ticket:
        """Queues a request. ValueError where its prompt is empty or leaves no room for a token."""
        if not 1 <= len(request.ids) < self.max_len:
            raise ValueError(f"a prompt of {len(request.ids)} tokens does not fit: 1 to {self.max_len - 1}")
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        form = request.grammar.start() if request.grammar else None
        tool = request.tool or self._tool
        tool = tool.start() if tool and not form else None
        ticket = Ticket(request, tool, list(request.ids), form)
        if form:
            ticket.forced.extend(form.forced())
        self._queue.append(ticket)
        if self._running:
            self._traffic = time.perf_counter()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, wherever it is; the next step says so. Nothing where it has ended already."""
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif self._running.pop(ticket, None) is None:
            return
        ticket.completion.finish_reason = "cancelled"
        self._cancelled.append(ticket)

    @property
    def arrays(self) -> tuple:
        return self.params, self._cache

    @property
    def busy(self) -> bool:
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

    def score(self, ids: Sequence[int], top: int) -> list[TokenLogprob]:
        """Log-probabilities of ids[1:], each after those before it, and of the `top` likeliest at each place.

        ids: as many as the context holds, at most. Beside requests: neither slots nor cache are touched, so that any
        thread may call it.
        """
        shapes = [(1, self.cfg.n_kv_head, ring, self.cfg.head_dim) for ring in kv.ring_sizes(self.cfg, self.max_len)]
        rows = [(np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)) for shape in shapes]
        found: list[TokenLogprob] = []
        for start in range(0, len(ids) - 1, kv.SLACK):
            piece, targets = ids[start:-1][: kv.SLACK], ids[start + 1 :][: kv.SLACK]
            chunk = self._shapes.chunk(len(piece), patient=False)
            padded = [np.array([*part, *[0] * (chunk - len(piece))], np.int32) for part in (piece, targets)]
            before = np.int32(ids[start - 1] if start else -1)
            told, rows = self._program.score(self.params, rows, *padded, before, np.int32(start), np.int32(len(piece)))
            for logprob, likely, values in zip(*(x[: len(piece)].tolist() for x in map(np.asarray, told))):
                found.append(TokenLogprob(logprob, tuple(zip(likely, values))[:top]))
        return found

    def warm_up(self, request: Request) -> Iterator[None]:
        """Compiles, one program at each step of the iterator, what requests with such settings can come to need.

        Any thread may do it, beside requests: nothing runs, and a request waits for its own programs alone.
        """
        how = mode([request], self.cfg.vocab_size)
        widths = sorted({self._shapes.width(n) for n in range(1, self._each + 1)})
        spans = sorted({self._shapes.span(n) for n in range(1, self.max_len + 1)})
        for width in widths:
            self._run_copy({}, width, compile_only=True)
            yield
        for span, width in itertools.product(spans, widths):
            for chunk in self._shapes.chunks:
                self._run_prefill([], width, chunk, span, compile_only=True)
                yield
            if not self._program.fused or span == spans[0]:  # one fused program serves all spans
                self._run_decode([], width, how, span, 0, compile_only=True)
                yield

    # ----------------------------------------------------------------------------------------- the scheduler

    def step(self) -> list[Event]:
        """One turn: admits, reuses, prefills a chunk, decodes a time slice; returns what came of it."""
        events = [Event(t, [], t.completion) for t in self._cancelled]
        self._cancelled.clear()
        self._admit()
        self._reuse()
        self._prefill()
        return events + self._decode()

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.slots:
            ticket = self._queue.popleft()
            slot = self._choose_slot(ticket)
            self._admitted += 1
            slot.last_used = self._admitted
            self._running[ticket] = slot
            self.counters.prompt_tokens += len(ticket.prompt)

    def _choose_slot(self, ticket: Ticket) -> Slot:
        """The free slot that suits a ticket best. Sets its leader where a prompt that it shares is being prefilled."""
        prompt, taken = ticket.prompt[:-1], set(self._running.values())
        load = Counter(s.device for s in taken)
        own = {s: s.reusable(prompt, self._safe) for s in self._slots if s not in taken}
        for slot, n in own.items():
            if 2 * n < len(slot.ids):  # it holds much more than that: worth keeping, so the shared prefix is copied
                own[slot] = 0
        best = max(own, key=lambda s: (own[s], -load[s.device], -s.last_used))
        shared = {t: kv.common_prefix(t.prompt[:-1], prompt) for t in self._running if not t.ready and t.leader is None}
        leader = max(shared, key=lambda t: shared[t], default=None)
        if leader is not None and shared[leader] >= own[best] + WORTH_SHARING:
            beside = [s for s in own if s.device == self._running[leader].device]
            if beside:
                ticket.leader, best = leader, min(beside, key=lambda s: s.last_used)
        return best

    def _reuse(self) -> None:
        """Starts every prompt that need not wait with what its slot holds of it, or copies that from another slot."""
        copies: dict[Slot, Slot] = {}  # to -> from
        for t, slot in self._running.items():
            leader = t.leader if t.leader in self._running else None
            if t.filled >= 0 or (leader is not None and not leader.ready):
                continue
            prompt, source = t.prompt[:-1], slot
            kept = slot.reusable(prompt, self._safe)
            for other in self._slots:
                n = other.reusable(prompt, self._safe) if other.device == slot.device else 0
                if n >= kept + (WORTH_SHARING if source is slot else 1):
                    source, kept = other, n
            if source is not slot:
                copies[slot] = copies.get(source, source)  # all are read before one is written
            slot.ids, slot.written = prompt[:kept], source.written if kept else 0
            t.filled, t.leader = kept, None
            self.counters.reused_tokens += kept
        if copies:
            self._run_copy(copies, self._width(copies))
            self.counters.calls += 1

    def _prefill(self) -> None:
        """Computes one chunk of the oldest prompts that are not in the cache yet."""
        waiting = [t for t in self._running if t.filled >= 0 and not t.ready]
        if not waiting:
            return
        beside = any(t.ready for t in self._running) and not self.patient
        longest = max(len(t.prompt) - 1 - t.filled for t in waiting)
        chunk = self._shapes.chunk(longest, self.patient)
        tickets = waiting[: max(1, (PREFILL_BESIDE if beside else PREFILL_TOKENS) // chunk)]
        end = max(min(t.filled + chunk, len(t.prompt) - 1) for t in tickets)
        self._run_prefill(tickets, self._width(self._running[t] for t in tickets), chunk, self._shapes.span(end))
        self.counters.calls += 1

    def _decode(self) -> list[Event]:
        tickets = [t for t in self._running if t.ready]
        if not tickets:
            return []
        width = self._width(self._running[t] for t in tickets)
        how = mode([t.request for t in tickets], self.cfg.vocab_size)
        n = self._slice_length(tickets, (width, how))
        span = self._shapes.span(max(t.length for t in tickets) - 1 + n)
        began = time.perf_counter()
        out = self._run_decode(tickets, width, how, span, n)
        self._pace[width, how] = (time.perf_counter() - began) / n
        self.counters.calls += 1
        return [self._finish_slice(t, decoded) for t, decoded in zip(tickets, out)]

    def _finish_slice(self, ticket: Ticket, out: Sequence[np.ndarray]) -> Event:
        """Takes what was decoded for a ticket; frees its slot where that was the end."""
        slot, completion, end = self._running[ticket], ticket.completion, ticket.length - 1 + len(out[0])
        first = len(completion.ids)
        self._take(ticket, *out)
        slot.ids = [*ticket.prompt, *completion.ids][:end]
        slot.written = max(slot.written, min(end, self.max_len))
        self.counters.generated_tokens += len(completion.ids) - first
        ticket.run += (len(completion.ids) - first - ticket.run) / 4
        if completion.finish_reason:
            del self._running[ticket]
            self.counters.answers += 1
            self.counters.answer_tokens += len(completion.ids)
        ended = completion if completion.finish_reason else None
        return Event(ticket, completion.ids[first:], ended, completion.logprobs[first:])

    def _take(self, ticket: Ticket, tokens: np.ndarray, again: np.ndarray, *likely: np.ndarray) -> None:
        """Appends what was decoded to the completion, up to its end or to where other tokens must follow.

        again: which of the T tokens are second draws; likely: `sampling.log_probabilities` of them.
        """
        out, request, form = ticket.completion, ticket.request, ticket.form
        for i, id in enumerate(tokens.tolist()):
            left = min(request.max_new_tokens - len(out.ids), self.max_len - ticket.length) - 1  # after this one
            is_forced = bool(ticket.forced)
            if is_forced and id != ticket.forced[0]:
                break  # forced when this was decoded already
            if is_forced:
                ticket.forced.popleft()
            elif form and not form.take(id, left, again[i]):
                ticket.forced.extend(form.forced())
                out.finish_reason = form.failed or ("stop" if form.ended and not ticket.forced else "")
                break
            if id in request.stop_ids:
                out.finish_reason = "stop"
                break
            out.ids.append(id)
            out.mask.append(int(not is_forced))
            if request.logprobs >= 0:
                logprob, ids, values = (x[i].tolist() for x in likely)
                out.logprobs.append(TokenLogprob(logprob, tuple(zip(ids, values))[: request.logprobs]))
            if not is_forced and (form or ticket.tool):
                ticket.forced.extend(form.forced() if form else ticket.tool.push(id))
            if form and form.ended and not ticket.forced:
                out.finish_reason = "stop"
                break
            if not left:
                out.finish_reason = "length"
                break

    def _slice_length(self, tickets: Sequence[Ticket], key: tuple) -> int:
        """Tokens of the next slice: short while a request waits or may soon, about SLICE_SECONDS of them otherwise.

        Patient: a fraction of the mean length of answers so far, as the rest of an answer's last slice is lost.
        """
        wanted = 0.0
        if self.patient:
            usual = max(len(t.completion.ids) for t in tickets)
            c = self.counters
            wanted = (c.answer_tokens / c.answers if c.answers else usual) / PATIENT_PARTS
        elif key in self._pace and time.perf_counter() > self._traffic + TRAFFIC_SECONDS:
            waits = self._queue or len(tickets) < len(self._running) or any(not t.completion.ids for t in tickets)
            wanted = 0.0 if waits else SLICE_SECONDS / self._pace[key]
        left = max(min(t.request.max_new_tokens - len(t.completion.ids), self.max_len - t.length) for t in tickets)
        n = min(max(int(wanted), SHORT), LONG, left)
        return min(n, round(max(t.run for t in tickets)) + 1) if all(t.form for t in tickets) else n

    # ---------------------------------------------------------------------------------- calls of the device

    def _width(self, slots: Iterable[Slot]) -> int:
        """Rows of each device in a call for some slots."""
        return self._shapes.width(max(Counter(s.device for s in slots).values()), self.patient)

    def _rows(self, slots: Sequence[Slot], width: int) -> tuple[np.ndarray, list[int]]:
        """The table (D, M = width) of the slots of a call, each device's own, and the row (of D * M) of each slot.

        Rows that are left over have a slot out of range, which is never read nor written.
        """
        table = np.full((self._devices, width), self._each, np.int32)
        next_row = [itertools.count(d * width) for d in range(self._devices)]
        if width == self._each:  # all slots, in their order
            rows = [s.device * width + s.place for s in slots]
        else:
            rows = [next(next_row[s.device]) for s in slots]
        table.flat[rows] = [s.place for s in slots]
        return table, rows

    def _run_copy(self, copies: dict[Slot, Slot], width: int, compile_only: bool = False) -> None:
        """Copies slots; {to: from}, both on the same device."""
        to, rows = self._rows(list(copies), width)
        sources = to.copy()
        sources.flat[rows] = [s.place for s in copies.values()]
        if compile_only:
            kv.copy.lower(*abstract((self._cache, sources, to))).compile()
        else:
            self._cache = kv.copy(self._cache, sources, to)

    def _run_prefill(
        self, tickets: Sequence[Ticket], width: int, chunk: int, span: int, compile_only: bool = False
    ) -> None:
        """Puts the next `chunk` ids of the prompts of tickets into the cache."""
        table, rows = self._rows([self._running[t] for t in tickets], width)
        R = table.size
        tokens = np.zeros((R, chunk), np.int32)
        before, start, count = np.full(R, -1, np.int32), np.zeros(R, np.int32), np.zeros(R, np.int32)
        for t, row in zip(tickets, rows):
            slot, piece = self._running[t], t.prompt[t.filled : min(t.filled + chunk, len(t.prompt) - 1)]
            tokens[row, : len(piece)] = piece
            start[row], count[row] = t.filled, len(piece)
            before[row] = t.prompt[t.filled - 1] if t.filled else -1
            t.filled += len(piece)
            slot.ids += piece
            slot.written = max(slot.written, t.filled)
        args = self.params, self._cache, table, tokens, before, start, count
        if compile_only:
            self._program.prefill.compile(span, *args)
        else:
            self._cache = self._program.prefill(span, *args)

    def _run_decode(
        self, tickets: Sequence[Ticket], width: int, how: Mode, span: int, n: int, compile_only: bool = False
    ) -> list[list]:
        """Decodes n tokens of each ticket: ids, which of them are second draws, and, where `how` wants them,
        `sampling.log_probabilities`."""
        table, rows = self._rows([self._running[t] for t in tickets], width)
        R = table.size
        last, position = np.full((R, 2), -1, np.int32), np.full(R, -1, np.int32)
        last[:, 1] = 0
        forced, settings = np.full((R, LONG), -1, np.int32), Settings.blank(R)
        for t, row in zip(tickets, rows):
            newest = [-1, *t.prompt[-2:], *t.completion.ids[-2:]]
            last[row], position[row] = newest[-2:], t.length - 1
            ahead = list(t.forced)[:LONG]
            forced[row, : len(ahead)] = ahead
            settings.fill(row, t.request)
        shaped = Shaped.blank(R, self.cfg.vocab_size) if how.shaped else None
        allowed = Allowed.blank(R, self.cfg.vocab_size) if how.formed else None
        for t, row in zip(tickets, rows):
            if shaped and t.request.shaping:
                shaped.fill(row, t.request.shaping, t.prompt, t.completion.ids)
            if allowed and t.form:
                allowed.place[row] = len(t.forced)
                t.form.fill(allowed.bits[row])
        if self._program.fused:  # kernels see for themselves how far they must look: one program serves all
            span = self.max_len
        args = self.params, self._cache, table, last, position, forced, settings, n, shaped, allowed
        if compile_only:
            self._program.decode.compile(span, how, *args)
            return []
        out, self._cache = self._program.decode(span, how, *args)
        ids, *more = (np.asarray(o) for o in out)
        again = more.pop(0) if how.formed else np.zeros(ids.shape, bool)
        return [[a[row, :n] for a in (ids, again, *more)] for row in rows]
