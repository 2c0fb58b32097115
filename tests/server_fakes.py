"""What the tests of the server share: a scripted engine, and an application served for real."""

import contextlib
import threading
import time

import uvicorn
from evals_fakes import ByteTokenizer

from nanochat_jax.engine.engine import Counters, Event, Ticket, TokenLogprob
from server.__main__ import bind
from server.app import create_app
from server.scheduler import Scheduler

TOK = ByteTokenizer()
INFO = {"run": "demo", "stage": "sft"}
USER = [{"role": "user", "content": "hello"}]


class Scripted:
    """The engine's interface; says `script` to every request, three tokens a step, as fast as `pace` lets it.

    Log-probabilities are made up: -0.5 for what it says, -1.5 and less for x, y, z.
    """

    def __init__(self, script, slots=2, max_len=192, pace=0.0):
        self.script, self.slots, self.max_len, self.pace = list(script), slots, max_len, pace
        self.waiting, self.running, self.ended, self.seen = [], [], [], []
        self.counters, self.broken, self.compiled = Counters(), False, 0

    def submit(self, request):
        ticket = Ticket(request, None, list(request.ids))
        self.seen.append(request)
        self.waiting.append(ticket)
        self.counters.prompt_tokens += len(request.ids)
        return ticket

    def cancel(self, ticket):
        for place in (self.waiting, self.running):
            if ticket in place:
                place.remove(ticket)
                ticket.completion.finish_reason = "cancelled"
                self.ended.append(ticket)

    def score(self, ids, top):
        return [self.logprob(id, top) for id in ids[1:]]

    def warm_up(self, request):
        for _ in range(3):
            self.compiled += 1
            yield

    @property
    def busy(self):
        return bool(self.waiting or self.running or self.ended)

    @property
    def active(self):
        return len(self.running)

    def step(self):
        time.sleep(self.pace)
        if self.broken:
            raise RuntimeError("out of memory")
        events = [Event(t, [], t.completion) for t in self.ended]
        self.ended = []
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.pop(0))
        return events + [self.advance(ticket) for ticket in list(self.running)]

    def advance(self, ticket):
        said, limit = ticket.completion.ids, ticket.request.max_new_tokens
        new = self.script[len(said) : min(len(said) + 3, limit)]
        said += new
        self.counters.generated_tokens += len(new)
        if len(said) in (len(self.script), limit):
            ticket.completion.finish_reason = "stop" if len(said) == len(self.script) else "length"
            self.running.remove(ticket)
        told = [self.logprob(id, ticket.request.logprobs) for id in new] if ticket.request.logprobs >= 0 else []
        return Event(ticket, new, ticket.completion if ticket.completion.finish_reason else None, told)

    @staticmethod
    def logprob(id, n):
        return TokenLogprob(-0.5, ((id, -0.5), *((b, -1.5 - i) for i, b in enumerate(b"xyz")))[:n])


def scripted_app(script, max_waiting=64, engine=None, **options):
    """(application, its engine)"""
    engine = engine or Scripted(script)
    return create_app(Scheduler(engine, max_waiting), TOK, INFO, **options), engine


@contextlib.contextmanager
def serving(app):
    """The URL of an application that a real server in a thread serves."""
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition, seconds=10.0):
    """Fails where a condition does not come to hold."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.002)
