"""The server and its scheduler: on a scripted engine, and on a real one of a few thousand parameters."""

import asyncio
import json
import re
import threading
import time

import httpx
import pytest
from evals_fakes import ByteTokenizer, tiny_model
from fastapi.testclient import TestClient

from nanochat_jax.calculator import CalculatorTool
from nanochat_jax.engine import Engine, Event, Request, Ticket
from server.__main__ import bind, main
from server.app import create_app
from server.scheduler import Busy, Scheduler, Stopped


class ServerTokenizer(ByteTokenizer):
    def stream(self):
        import codecs

        class Stream:
            def __init__(self, decode_bytes):
                self.utf8, self.decode_bytes = codecs.getincrementaldecoder("utf-8")(errors="replace"), decode_bytes

            def push(self, id):
                return self.utf8.decode(self.decode_bytes([id]))

            def flush(self):
                return self.utf8.decode(b"", final=True)

        return Stream(self.decode_bytes)


TOK = ServerTokenizer()


class Scripted:
    """The engine's interface; says `script` to every request, three tokens a step, as fast as `pace` lets it."""

    def __init__(self, script, slots=2, max_len=192, pace=0.0):
        self.script, self.slots, self.max_len, self.pace = script, slots, max_len, pace
        self.waiting, self.running, self.ended, self.seen = [], [], [], []
        self.broken = False

    def submit(self, request):
        ticket = Ticket(request, None)
        self.seen.append(request)
        self.waiting.append(ticket)
        return ticket

    def cancel(self, ticket):
        for place in (self.waiting, self.running):
            if ticket in place:
                place.remove(ticket)
                ticket.completion.finish_reason = "cancelled"
                self.ended.append(ticket)

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
        for ticket in list(self.running):
            done = len(ticket.completion.ids)
            new = self.script[done : min(done + 3, ticket.request.max_new_tokens)]
            ticket.completion.ids += new
            if len(ticket.completion.ids) in (len(self.script), ticket.request.max_new_tokens):
                whole = len(ticket.completion.ids) == len(self.script)
                ticket.completion.finish_reason = "stop" if whole else "length"
                self.running.remove(ticket)
            events.append(Event(ticket, new, ticket.completion if ticket.completion.finish_reason else None))
        return events


SAID = "Grüße, 世界! 🙂"
SCRIPT = [*SAID[:6].encode(), TOK.python_start, *b"1+2", TOK.python_end, TOK.output_start, *b"3", TOK.output_end]
SCRIPT += SAID[6:].encode()
INFO = {"run": "demo", "stage": "sft"}
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def scripted():
    return Scripted(SCRIPT)


@pytest.fixture
def client(scripted):
    with TestClient(create_app(Scheduler(scripted, max_waiting=2), TOK, INFO)) as c:
        yield c


def stream_of(response):
    """The chunks of a streamed answer."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(e) for e in events[:-1]]


def test_whole_answer(client, scripted):
    got = client.post("/v1/chat/completions", json={"messages": USER, "seed": 7, "top_p": 0.5}).json()
    assert got["choices"][0]["message"] == {"role": "assistant", "content": SAID}
    assert got["choices"][0]["finish_reason"] == "stop" and got["object"] == "chat.completion"
    prompt = [TOK.bos, TOK.user_start, *b"hello", TOK.user_end, TOK.assistant_start]
    assert scripted.seen == [Request(prompt, 256, 0.6, 50, 0.5, 7, (TOK.assistant_end, TOK.bos))]
    assert got["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(SCRIPT),
        "total_tokens": len(prompt) + len(SCRIPT),
    }


def test_streamed_answer_is_the_same_in_whole_characters(client):
    chunks = stream_of(client.post("/v1/chat/completions", json={"messages": USER, "stream": True}))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == SAID
    assert not any("\ufffd" in d.get("content", "") for d in deltas)
    tools = [d["tool"] for d in deltas if "tool" in d]
    assert "".join(t["text"] for t in tools if t["type"] == "python") == "1+2"
    assert "".join(t["text"] for t in tools if t["type"] == "python_output") == "3"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"]
    assert len({c["id"] for c in chunks}) == 1 and len(chunks) > 5


def test_token_limit_is_said(client):
    got = client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 4}).json()
    assert got["choices"][0]["finish_reason"] == "length" and got["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 422, "messages: Field required"),
        ({"messages": []}, 422, "at least 1"),
        ({"messages": USER, "temperature": 3}, 422, "temperature: .*less than or equal to 2"),
        ({"messages": USER, "top_p": 0}, 422, "top_p"),
        ({"messages": USER, "max_tokens": 0}, 422, "max_tokens"),
        ({"messages": USER, "stop": ["x"]}, 422, "stop: Extra inputs are not permitted"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, "role"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, 422, "200000 is the limit"),
        ({"messages": USER * 2}, 400, "message 1 is from 'user'"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, 400, "must be from the user"),
    ],
)
def test_bad_requests_are_one_clear_message(client, body, status, says):
    got = client.post("/v1/chat/completions", json=body)
    assert got.status_code == status and re.search(says, got.json()["error"]["message"])


def test_a_chat_past_the_context_is_fitted(client, scripted):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 20} for i in range(41)]
    assert client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 50}).status_code == 200
    assert len(scripted.seen[-1].ids) <= scripted.max_len - 50
    assert (
        client.post("/v1/chat/completions", json={"messages": [{**USER[0], "content": "x" * 9999}]}).status_code == 200
    )
    assert len(scripted.seen[-1].ids) == scripted.max_len // 2


def test_health_models_and_page(client):
    assert client.get("/health").json() == {"status": "ok", **INFO, "slots": 2, "active": 0, "queued": 0}
    assert client.get("/v1/models").json()["data"][0]["id"] == "demo/sft"
    page = client.get("/")
    assert page.status_code == 200 and "<textarea" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "") and "https://" not in page.text
    assert "innerHTML" not in page.text


def test_engine_failure_is_reported_to_those_who_wait_and_to_health(client, scripted):
    scripted.broken = True
    got = client.post("/v1/chat/completions", json={"messages": USER})
    assert got.status_code == 500 and "out of memory" in got.json()["error"]["message"]
    health = client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert client.post("/v1/chat/completions", json={"messages": USER}).status_code == 500


def collector():
    updates, ended = [], threading.Event()

    def deliver(update):
        updates.append(update)
        if update.completion is not None or update.error is not None:
            ended.set()

    return updates, ended, deliver


REQUEST = Request([1, 2], 100)


def test_scheduler_bounds_its_queue_and_counts():
    engine = Scripted(SCRIPT, slots=1, pace=0.02)
    scheduler = Scheduler(engine, max_waiting=1)
    scheduler.start()
    first, second = collector(), collector()
    scheduler.submit(REQUEST, first[2])
    scheduler.submit(REQUEST, second[2])
    with pytest.raises(Busy):
        scheduler.submit(REQUEST, second[2])
    assert first[1].wait(10) and second[1].wait(10)
    assert sum((u.ids for u in second[0]), []) == SCRIPT
    third = collector()
    scheduler.submit(REQUEST, third[2])  # there is room again
    assert third[1].wait(10)
    scheduler.stop()
    assert scheduler.counts() == {"active": 0, "queued": 0}
    with pytest.raises(Stopped):
        scheduler.submit(REQUEST, third[2])


def test_scheduler_cancels_and_stops():
    engine = Scripted(SCRIPT * 50, slots=1, pace=0.01)
    scheduler = Scheduler(engine)
    scheduler.start()
    running, waiting, left = collector(), collector(), collector()
    long = Request([1, 2], 10_000)
    a, b = scheduler.submit(long, running[2]), scheduler.submit(long, waiting[2])
    scheduler.cancel(b)
    scheduler.cancel(a)
    assert running[1].wait(10) and waiting[1].wait(10)
    assert running[0][-1].completion.finish_reason == waiting[0][-1].completion.finish_reason == "cancelled"
    scheduler.cancel(a)  # once more: nothing
    scheduler.submit(long, left[2])
    scheduler.stop()
    assert left[1].wait(10) and isinstance(left[0][-1].error, Stopped)


def test_clients_are_served_side_by_side_and_leaving_cancels():
    engine = Scripted(SCRIPT * 30, slots=2, pace=0.005)
    app = create_app(Scheduler(engine), TOK, INFO)

    async def run():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"messages": USER, "max_tokens": 500}
                both = [client.post("/v1/chat/completions", json=body) for _ in range(2)]
                answers = await asyncio.gather(*both)
        return answers

    began = time.perf_counter()
    answers = asyncio.run(run())
    assert [a.status_code for a in answers] == [200, 200]
    steps = len(SCRIPT) * 30 / 3
    assert time.perf_counter() - began < 2 * steps * 0.005 + 5


def test_leaving_a_stream_cancels_it_in_the_engine():
    engine = Scripted(SCRIPT * 100, slots=1, pace=0.005)
    scheduler = Scheduler(engine)
    app = create_app(scheduler, TOK, INFO)

    async def run():
        from server.app import Answer

        async with app.router.lifespan_context(app):
            answer = Answer(scheduler, TOK, Request([1, 2], 100_000))
            pieces = answer.pieces()
            await anext(pieces)
            await pieces.aclose()
            for _ in range(400):
                if not engine.busy:
                    return True
                await asyncio.sleep(0.01)

    assert asyncio.run(run())


def test_a_real_engine_behind_the_server():
    engine = Engine(tiny_model(), slots=2, max_len=192, tool=CalculatorTool(TOK))
    with TestClient(create_app(Scheduler(engine), TOK, INFO)) as client:
        body = {"messages": USER, "max_tokens": 24, "seed": 3, "temperature": 1.0}
        whole = client.post("/v1/chat/completions", json=body).json()
        chunks = stream_of(client.post("/v1/chat/completions", json={**body, "stream": True}))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] <= 24


def test_command_line_errors_are_one_line(tmp_path, capsys):
    assert main(["--run-dir", str(tmp_path), "--port", "0"]) == 2
    taken = bind("127.0.0.1", 0)
    taken.listen()
    assert main(["--run-dir", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    errors = capsys.readouterr().err.strip().split("\n")
    assert len(errors) == 2 and "not a run directory" in errors[0] and "take another --port" in errors[1]
