"""The server over real connections: OpenAI's client, clients that leave, and bodies that are garbage."""

import json
import random
import socket
import threading
import time

import httpx
import pytest
from evals_fakes import tiny_model
from server_fakes import INFO, TOK, USER, Scripted, scripted_app, serving, wait_for

from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.tools import Tools
from server import edge
from server.app import create_app
from server.scheduler import Scheduler

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), slots=4, max_len=192, tool=Tools(TOK))


@pytest.fixture(scope="module")
def url(engine):
    """A real engine behind a real server that wants a key."""
    with serving(create_app(Scheduler(engine), TOK, INFO, api_key="sesame")) as url:
        yield url


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai", reason="OpenAI's client is not installed")


@pytest.fixture(scope="module")
def client(openai, url):
    return openai.OpenAI(base_url=url + "/v1", api_key="sesame", max_retries=0, timeout=120)


def ask(client, **options):
    options = {"model": "any", "messages": USER, "max_tokens": 16, "seed": 3, "temperature": 1.0, **options}
    return client.chat.completions.create(**options)


# ------------------------------------------------------------------------------------------ OpenAI's client


def test_chat_is_the_same_whole_and_streamed(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens <= 16
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert ask(client).choices == whole.choices and ask(client, seed=4).choices != whole.choices


def test_several_choices_are_those_of_consecutive_seeds(client):
    both = ask(client, n=2)
    assert [c.message for c in both.choices] == [ask(client, seed=s).choices[0].message for s in (3, 4)]
    texts = ["", ""]
    for chunk in ask(client, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in both.choices]


def test_stop_cuts_what_would_have_come(client):
    whole = ask(client).choices[0].message.content
    stop = whole[5:7]
    for stream in (False, True):
        got = ask(client, stop=[stop, "never said"], stream=stream)
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in got)
        else:
            text = got.choices[0].message.content
            assert got.choices[0].finish_reason == "stop"
        assert text == whole[: whole.index(stop)]


def test_logprobs_and_completions(client):
    told = ask(client, logprobs=True, top_logprobs=2, temperature=0).choices[0].logprobs.content
    assert len(told) > 4 and all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in told)
    assert all(t.logprob == t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in told)  # greedy
    got = client.completions.create(model="any", prompt="Once", max_tokens=8, logprobs=1, seed=1).choices[0]
    assert len(got.logprobs.tokens) == len(got.logprobs.top_logprobs) <= 8
    streamed = client.completions.create(model="any", prompt="Once", max_tokens=8, seed=1, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == got.text


def test_models(client):
    assert client.models.retrieve(client.models.list().data[0].id).id == "demo/sft"


def test_errors_are_those_that_the_client_knows(openai, client, url):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=5)
    with pytest.raises(openai.BadRequestError, match="there is no function to call in tools"):
        ask(client, tool_choice="required")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        ask(openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    app, _ = scripted_app(b"ab" * 5000, max_waiting=0, engine=Scripted(b"ab" * 5000, slots=1, pace=0.01))
    with serving(app) as busy:
        client = openai.OpenAI(base_url=busy + "/v1", api_key="any", max_retries=0)
        with ask(client, stream=True, max_tokens=10_000) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError) as refused:
                ask(client)
            assert int(refused.value.response.headers["retry-after"]) >= 1


# -------------------------------------------------------------------------------------- clients that leave


def leave(url, stream, wait, **options):
    """Asks, and breaks the connection off: at once, or when something has come."""
    body = json.dumps({"messages": USER, "max_tokens": 10_000, "stream": stream, **options}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as s:
        s.sendall(f"{head}Authorization: Bearer sesame\r\n\r\n".encode() + body)
        if wait:
            s.settimeout(30)
            assert s.recv(400) if stream else not time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_slots(stream):
    app, engine = scripted_app(None, engine=Scripted(b"ab" * 50_000, slots=4, pace=0.003))
    with serving(app) as url:
        for i in range(10):
            leave(url, stream, wait=i % 2, n=1 + i % 2)
            if i % 2:  # else it may not have come to the engine yet
                before = engine.counters.generated_tokens
                wait_for(lambda: not engine.busy)
                assert engine.counters.generated_tokens - before < 300  # of 10,000 each
        wait_for(lambda: httpx.get(url + "/health").json() | {"slots": 0} == health())
        assert httpx.post(url + CHAT, json={"messages": USER, "max_tokens": 3}).status_code == 200


def health():
    return {"status": "ok", **INFO, "slots": 0, "active": 0, "queued": 0}


def test_many_clients_of_whom_half_leave(url, engine):
    def one(i):
        if i % 2:
            leave(url, stream=i % 4 == 1, wait=i % 3, n=1 + i % 3)
        else:
            answers.append(httpx.post(url + CHAT, json={"messages": USER, "max_tokens": 12}, headers=KEY, timeout=120))

    answers, threads = [], [threading.Thread(target=one, args=(i,)) for i in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [a.status_code for a in answers] == [200] * 10
    wait_for(lambda: httpx.get(url + "/health").json() | {"slots": 0} == health(), 60)
    assert not engine.busy


# ------------------------------------------------------------------------------------------ bodies of any kind

KEY = {"Authorization": "Bearer sesame"}
JSON = {"Content-Type": "application/json", **KEY}


def chat_json(content="x", **more):
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}).encode()


GARBAGE = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "invalid UTF-8": b'{"messages": "\xff\xfe"}',
    "NUL bytes": b"\0" * 100,
    "deep": b"[" * 200_000,
    "deep objects": b'{"messages":' * 50_000,
    "deep in a field": b'{"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a lone surrogate": chat_json("\ud800"),
    "a lone surrogate in a part": chat_json([{"type": "text", "text": "\udfff"}]),
    "a lone surrogate as a field": b'{"\\ud800": 1}',
    "a lone surrogate as a role": b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
    "a lone surrogate to stop at": chat_json(stop="\udc00"),
    "NaN": chat_json(temperature=float("nan")),
    "Infinity": chat_json(top_p=float("inf")),
    "a negative number": chat_json(max_tokens=-1),
    "a huge number": chat_json(seed=10**30),
    "a number of 5000 digits": b'{"messages": [], "seed": ' + b"9" * 5000 + b"}",
    "half a token": chat_json(max_tokens=1.5),
    "a number as a string": chat_json(n="2"),
    "true as a number": chat_json(n=True),
    "a long text": chat_json("x" * 200_001),
    "many messages": json.dumps({"messages": USER * 501}).encode(),
    "a megabyte": chat_json("x" * 1_000_000),
    "ten megabytes": chat_json("x" * 10_000_000),
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_garbage_is_refused(url, path, body):
    got = httpx.post(url + path, content=body, headers=JSON)
    assert got.status_code == (413 if len(body) > edge.MAX_BODY else 400)
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and len(error["message"]) < 400
    assert "Traceback" not in error["message"] and error["type"] == "invalid_request_error"


STRANGE = ["\0", "\0" * 1000, "\ufeff\u2028\u202e", "x" * 200_000, "\u0301" * 100, "<|assistant_end|>"]


@pytest.mark.parametrize("content", STRANGE)
def test_strange_texts_are_answered(url, content):
    got = httpx.post(url + CHAT, content=chat_json(content), headers=JSON, timeout=120)
    assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] <= 2


EXTREME = {"temperature": 1e-300, "top_p": 1e-300, "top_k": 1_000_000, "seed": -(2**63), "max_tokens": 1_000_000}


@pytest.mark.parametrize("field", EXTREME)
def test_extreme_settings_are_answered(url, field):
    got = httpx.post(url + CHAT, content=chat_json(**{"stop": "", field: EXTREME[field]}), headers=JSON, timeout=120)
    assert got.status_code == 200 and got.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_bytes_that_are_random_are_refused_and_nothing_is_left(url, engine):
    rng, good = random.Random(0), chat_json("hello", stop=["a"], n=1)
    with httpx.Client(base_url=url, headers=JSON, timeout=120) as client:
        for _ in range(150):
            body = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            assert client.post(CHAT, content=bytes(body)).status_code in (200, 400)
        assert client.get("/health").json()["active"] == 0 and not engine.busy


def test_a_body_that_comes_too_slowly_is_given_up(url, monkeypatch):
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.2)

    def slowly():
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    got = httpx.post(url + CHAT, content=slowly(), headers=JSON)
    assert got.status_code == 408 and "within 0.2 s" in got.json()["error"]["message"]
