"""The server and its scheduler, on a scripted engine: what goes in, what comes out, and what is refused."""

import asyncio
import json
import re
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi.testclient import TestClient
from server_fakes import INFO, TOK, USER, Scripted, scripted_app, serving, wait_for

from nanochat_jax.engine.engine import Request
from server.__main__ import bind, main
from server.answer import Answer
from server.app import create_app
from server.choice import Choice
from server.edge import MAX_BODY
from server.metrics import Metrics
from server.scheduler import Busy, Scheduler, Stopped
from server.schemas import ChatRequest

SAID = "Grüße, 世界! 🙂"
CALL = [TOK.python_start, *b"1+2", TOK.python_end, TOK.output_start, *b"3", TOK.output_end]
SCRIPT = [*SAID[:6].encode(), *CALL, *SAID[6:].encode()]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def scripted():
    return Scripted(SCRIPT)


@pytest.fixture
def client(scripted):
    with TestClient(scripted_app(None, 2, scripted)[0]) as c:
        yield c


def saying(script, **options):
    return TestClient(scripted_app(script, **options)[0])


def stream_of(response):
    """The chunks of a streamed answer."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(e) for e in events[:-1]]


def choices_of(chunks, index=0):
    return [choice for c in chunks for choice in c["choices"] if choice["index"] == index]


# ------------------------------------------------------------------------------------------------------ chat


def test_whole_answer(client, scripted):
    got = client.post(CHAT, json={"messages": USER, "seed": 7, "top_p": 0.5}).json()
    tool = [{"index": 0, "name": "calculator", "input": "1+2", "output": "3"}]
    assert got["choices"][0]["message"] == {"role": "assistant", "content": SAID, "tool": tool}
    assert got["choices"][0]["finish_reason"] == "stop" and got["object"] == "chat.completion"
    prompt = [TOK.bos, TOK.user_start, *b"hello", TOK.user_end, TOK.assistant_start]
    assert scripted.seen == [Request(prompt, 256, 0.6, 50, 0.5, 7, (TOK.assistant_end, TOK.bos))]
    total = len(prompt) + len(SCRIPT)
    assert got["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(SCRIPT),
        "total_tokens": total,
    }
    assert "context" not in got and "logprobs" not in got["choices"][0]


def test_streamed_answer_is_the_same_in_whole_characters(client):
    chunks = stream_of(client.post(CHAT, json={"messages": USER, "stream": True}))
    deltas = [c["delta"] for c in choices_of(chunks)]
    assert "".join(d.get("content", "") for d in deltas) == SAID
    assert not any("\ufffd" in d.get("content", "") for d in deltas)
    assert deltas[0]["role"] == "assistant" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({c["id"] for c in chunks}) == 1 and len(chunks) > 5
    assert not any("usage" in c or "context" in c for c in chunks)


def test_calls_of_the_tool_stream_at_their_places():
    script = [*b"a", *CALL, *b"b", TOK.python_start, *b"7*8", TOK.python_end, *CALL, *b"c"]
    with saying(script) as client:
        chunks = stream_of(client.post(CHAT, json={"messages": USER, "stream": True}))
        whole = client.post(CHAT, json={"messages": USER}).json()["choices"][0]["message"]
    calls, order = {}, ""
    for delta in (c["delta"] for c in choices_of(chunks)):
        for tool in delta.get("tool", ()):  # put together as OpenAI's clients do
            call = calls.setdefault(tool["index"], {"name": "", "input": "", "output": ""})
            for part in call:
                call[part] += tool.get(part, "")
            order += str(tool["index"])
        order += delta.get("content", "")
    want = [("1+2", "3"), ("7*8", ""), ("1+2", "3")]
    want = [{"name": "calculator", "input": said, "output": got} for said, got in want]
    assert [calls[i] for i in sorted(calls)] == want
    assert whole == {"role": "assistant", "content": "abc", "tool": [{"index": i, **c} for i, c in enumerate(want)]}
    assert re.fullmatch("a0+b1+2+c", order)


def test_usage_comes_last_where_it_is_wanted(client):
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4}
    *chunks, last = stream_of(client.post(CHAT, json=body))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(c["usage"] is None for c in chunks) and chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_several_choices_have_their_own_seeds_and_are_interleaved(client, scripted):
    body = {"messages": USER, "n": 2, "seed": 5, "stream": True}
    chunks = stream_of(client.post(CHAT, json=body))
    for index in (0, 1):
        mine = choices_of(chunks, index)
        assert "".join(c["delta"].get("content", "") for c in mine) == SAID
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
    order = [c["index"] for chunk in chunks for c in chunk["choices"]]
    assert order != sorted(order)
    got = client.post(CHAT, json={**body, "stream": False}).json()
    assert [c["index"] for c in got["choices"]] == [0, 1] and got["usage"]["completion_tokens"] == 2 * len(SCRIPT)
    assert [r.seed for r in scripted.seen] == [5, 6, 5, 6]


def test_parts_of_the_history_render_to_what_the_model_said(client, scripted):
    parts = [{"type": "text", "text": "a"}, {"type": "python", "text": "1+2"}, {"type": "python_output", "text": "3"}]
    asked = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    told = {"role": "developer", "content": [{"type": "text", "text": "S"}]}
    history = [told, {"role": "user", "content": asked}, {"role": "assistant", "content": parts}, *USER]
    assert client.post(CHAT, json={"messages": history}).status_code == 200
    said = [TOK.assistant_start, *b"a", *CALL, TOK.assistant_end]
    first = [TOK.bos, TOK.user_start, *b"S\n\nhello", TOK.user_end]
    assert scripted.seen[0].ids == [*first, *said, TOK.user_start, *b"hello", TOK.user_end, TOK.assistant_start]
    answered = client.post(CHAT, json={"messages": USER}).json()["choices"][0]["message"]
    assert client.post(CHAT, json={"messages": [*USER, answered, *USER]}).status_code == 200


def test_a_chat_past_the_context_is_fitted_and_the_reply_says_so(client, scripted):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i:2} " * 2} for i in range(41)]
    body = {"messages": turns, "max_tokens": 50}
    got = client.post(CHAT, json=body).json()
    assert len(scripted.seen[-1].ids) <= scripted.max_len - 50
    dropped = got["context"]["dropped_messages"]
    assert dropped > 30 and dropped % 2 == 0 and got["context"]["truncated"] is False
    text = TOK.decode(scripted.seen[-1].ids)
    assert "turn  0" in text and "turn  1" in text and "turn  2" not in text and "turn 40" in text
    chunks = stream_of(client.post(CHAT, json={**body, "stream": True}))
    assert chunks[0]["context"] == got["context"] and not any("context" in c for c in chunks[1:])
    got = client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 9999}]}).json()
    assert got["context"] == {"dropped_messages": 0, "truncated": True}
    assert len(scripted.seen[-1].ids) == scripted.max_len * 2 // 3


def test_max_completion_tokens_and_nulls(client, scripted):
    nulls = dict.fromkeys(["temperature", "top_p", "top_k", "n", "stop", "seed", "max_tokens", "stream", "logprobs"])
    body = {"messages": USER, **nulls, "max_completion_tokens": 4}
    got = client.post(CHAT, json=body).json()
    assert got["choices"][0]["finish_reason"] == "length" and got["usage"]["completion_tokens"] == 4
    seen = scripted.seen[0]
    assert (seen.temperature, seen.top_k, seen.top_p, seen.max_new_tokens) == (0.6, 50, 1.0, 4)


# ------------------------------------------------------------------------------------------ stop strings


def pushed(script, stops, by=1, logprobs=False):
    """(all that was shown, in pieces; the choice) of a script that comes `by` ids at a time."""
    choice, shown = Choice(TOK, stops), []
    for at in range(0, len(script), by):
        ids = script[at : at + by]
        shown += choice.push(ids, [Scripted.logprob(id, 0) for id in ids] if logprobs else ())
    return shown + choice.finish("length"), choice


@pytest.mark.parametrize("by", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("said", "stops", "want", "reason"),
    [
        ("one two", ["two"], "one ", "stop"),
        ("one twtwo", ["two", "xyz"], "one tw", "stop"),
        ("one tw", ["two"], "one tw", "length"),
        ("aaab", ["aab"], "a", "stop"),
        ("stop", ["stop"], "", "stop"),
        ("a\n\nb", ["\n\n", "b"], "a", "stop"),
        ("héé雪x", ["é雪"], "hé", "stop"),
        ("later first", ["first", "later"], "", "stop"),
        ("abc", [], "abc", "length"),
    ],
)
def test_stop_strings_over_the_borders_of_tokens(said, stops, want, reason, by):
    shown, choice = pushed(list(said.encode()), stops, by)
    assert "".join(p.text for p in shown) == want == choice.text and choice.reason == reason
    seen = ""
    for part in shown:  # what has been shown never begins a stop string that then comes
        seen += part.text
        assert want.startswith(seen)


def test_what_waits_for_a_stop_string_keeps_calls_at_their_places():
    shown, choice = pushed([*b"ab", *CALL, *b"cd"], ["bcX"])
    assert "".join(p.text for p in shown) == "ab1+23cd" and choice.text == "abcd" and len(choice.calls) == 1
    shown, choice = pushed([*b"ab", *CALL, *b"cd"], ["bc"])
    assert "".join(p.text for p in shown) == "a" and choice.reason == "stop" and not choice.calls


def test_tokens_of_a_text_that_was_cut():
    _, choice = pushed(list(b"one two"), ["tw"], logprobs=True)
    assert bytes(t.id for t in choice.tokens) == b"one " and [t.offset for t in choice.tokens] == [0, 1, 2, 3]


def test_a_stop_string_ends_the_request_in_the_engine():
    engine = Scripted(list(b"go on. " * 5000), pace=0.001)
    with saying(None, engine=engine) as client:
        for stop in (". g", ["zzz", ". g"]):
            got = client.post(CHAT, json={"messages": USER, "stop": stop, "max_tokens": 30_000}).json()
            assert got["choices"][0]["message"]["content"] == "go on" and got["choices"][0]["finish_reason"] == "stop"
            assert got["usage"]["completion_tokens"] == len("go on. g")
            wait_for(lambda: not engine.busy)
        body = {"messages": USER, "stop": ". g", "stream": True, "max_tokens": 30_000}
        chunks = stream_of(client.post(CHAT, json=body))
        assert "".join(c["delta"].get("content", "") for c in choices_of(chunks)) == "go on"
        wait_for(lambda: not engine.busy)


# ------------------------------------------------------------------------------- completions, log-probabilities


def test_completions_go_on_from_text(client, scripted):
    got = client.post(TEXT, json={"prompt": "Once", "n": 2, "seed": 1}).json()
    assert [c["text"] for c in got["choices"]] == [SAID] * 2 and got["object"] == "text_completion"
    assert scripted.seen[0].ids == [TOK.bos, *b"Once"]
    body = {"prompt": "", "stream": True, "stream_options": {"include_usage": True}}
    chunks = stream_of(client.post(TEXT, json=body))
    assert "".join(c["text"] for c in choices_of(chunks)) == SAID and chunks[-1]["usage"]["prompt_tokens"] == 1
    long = client.post(TEXT, json={"prompt": "x" * 191})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    assert client.post(TEXT, json={"prompt": "x" * 190}).status_code == 200


def test_logprobs_of_completions(client):
    body = {"prompt": "Once", "logprobs": 2}
    [choice] = client.post(TEXT, json=body).json()["choices"]
    told = choice["logprobs"]
    ids = list(SAID.encode())
    assert told["tokens"] == [chr(id) if id < 128 else f"bytes:\\x{id:02x}" for id in ids]
    assert told["token_logprobs"] == [-0.5] * len(ids)
    assert told["top_logprobs"][0] == {"G": -0.5, "x": -1.5}
    assert [choice["text"][i] for i in told["text_offset"][:3]] == ["G", "r", "ü"]
    chunks = stream_of(client.post(TEXT, json={**body, "stream": True}))
    for name, values in told.items():
        assert [v for c in choices_of(chunks) for v in c["logprobs"][name]] == values


def test_logprobs_of_chat(client):
    body = {"messages": USER, "logprobs": True, "top_logprobs": 3}
    told = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(t["bytes"]) for t in told).decode() == SAID  # the calculator's tokens are not visible ones
    assert told[0]["token"] == "G" and told[0]["logprob"] == -0.5
    assert [t["token"] for t in told[0]["top_logprobs"]] == ["G", "x", "y"]
    chunks = choices_of(stream_of(client.post(CHAT, json={**body, "stream": True})))
    assert [t for c in chunks if "logprobs" in c for t in c["logprobs"]["content"]] == told
    plain = client.post(CHAT, json={"messages": USER, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({}, "messages: Field required", "messages"),
        ({"messages": []}, "at least 1", "messages"),
        ({"messages": USER, "temperature": 3}, "temperature: .*less than or equal to 2", "temperature"),
        ({"messages": USER, "temperature": "1"}, "temperature: .*valid number", "temperature"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"messages": USER, "n": 9}, "n: .*less than or equal to 8", "n"),
        (
            {"messages": USER, "presence_penalty": 2.5},
            "presence_penalty: .*less than or equal to 2",
            "presence_penalty",
        ),
        (
            {"messages": USER, "tool_choice": "required"},
            "tool_choice is 'required', and there is no function to call in tools",
            None,
        ),
        ({"messages": USER, "seed": 2**63}, "seed", "seed"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs needs logprobs", None),
        (
            {"messages": USER, "response_format": {"type": "xml"}},
            "response_format: text, json_object and json_schema are known, not 'xml'",
            None,
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages: unknown role 'robot'", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part of type 'image_url'",
            "messages",
        ),
        ({"messages": [{**USER[0], "content": "x" * 300_000}]}, "200000 is the limit", None),
    ],
)
def test_bad_requests_are_one_clear_message(client, scripted, body, says, param):
    got = client.post(CHAT, json=body)
    error = got.json()["error"]
    assert got.status_code == 400 and re.search(says, error["message"]) and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and param in (None, error["param"])
    assert not scripted.seen


def test_harmless_fields_of_clients_are_taken(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "frequency_penalty": 0.0}
    body = {"messages": USER, "model": "gpt-4", "response_format": {"type": "text"}, **harmless}
    assert client.post(CHAT, json=body).status_code == 200


def test_every_error_has_the_same_shape(client):
    for got, status in [
        (client.get("/nope"), 404),
        (client.get("/static/nope.js"), 404),
        (client.get("/static/../app.py"), 404),
        (client.post("/v1/nope"), 404),
        (client.get("/v1/models/other"), 404),
        (client.get(CHAT), 405),
        (client.post(CHAT, content=b"{}"), 400),
        (client.post(CHAT, content=b"x" * (MAX_BODY + 1)), 413),
        (client.post(CHAT, content=(b"x" * 1000 for _ in range(1001))), 413),  # without a Content-Length
    ]:
        assert got.status_code == status, got.url
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_too_many_wait(scripted):
    with saying(None, max_waiting=2, engine=scripted) as client:
        assert client.post(CHAT, json={"messages": USER, "n": 4}).status_code == 200
        seen = len(scripted.seen)
        got = client.post(CHAT, json={"messages": USER, "n": 5})  # waiting would not help
        assert got.status_code == 400 and "5 answers at once, and 4 are the most" in got.json()["error"]["message"]
        assert len(scripted.seen) == seen and client.get("/health").json()["queued"] == 0
    app, engine = scripted_app(None, max_waiting=2, engine=Scripted(SCRIPT, slots=2, pace=0.1))
    with (
        serving(app) as url,
        httpx.stream("POST", url + CHAT, json={"messages": USER, "n": 3, "stream": True}) as first,
    ):
        next(first.iter_lines())
        got = httpx.post(url + CHAT, json={"messages": USER, "n": 2})  # all or none
        assert got.status_code == 429 and got.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(got.headers["Retry-After"]) <= 60 and len(engine.seen) <= 3


def test_key():
    with saying(SCRIPT, api_key="sesame") as client:
        for path in ("/health", "/ready", "/", "/static/app.js"):
            assert client.get(path).status_code == 200, path
        for path in ("/metrics", "/v1/models", "/v1/nope"):
            assert client.get(path).status_code == 401, path
        for key in ("Bearer x", "Bearer ", "sesame", "Basic sesame", "Bearer sésame".encode()):
            got = client.post(CHAT, json={"messages": USER}, headers={"Authorization": key})
            assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sesame"}
        assert client.post(CHAT, json={"messages": USER}, headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200


def test_other_origins_may_call_only_where_they_are_named():
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    allowed = "access-control-allow-origin"
    with saying(SCRIPT) as client:
        assert allowed not in client.options(CHAT, headers=asks).headers
        assert allowed not in client.get("/v1/models", headers=asks).headers
    with saying(SCRIPT, cors_origins=["https://a.example"], api_key="k") as client:
        assert client.options(CHAT, headers=asks).headers[allowed] == "https://a.example"
        assert client.get("/v1/models", headers=asks).headers[allowed] == "https://a.example"  # also a refusal
        other = {**asks, "Origin": "https://b.example"}
        assert allowed not in client.get("/v1/models", headers=other).headers


# ------------------------------------------------------------------------------------------- watching, the page


def test_health_ready_models(client):
    assert client.get("/health").json() == {"status": "ok", **INFO, "slots": 2, "active": 0, "queued": 0}
    assert client.get("/ready").status_code == 200
    [entry] = client.get("/v1/models").json()["data"]
    assert entry["id"] == "demo/sft" and client.get("/v1/models/demo/sft").json() == entry


def test_page_is_served_so_that_it_can_load_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "<textarea" in page.text
    assert "default-src 'none'; script-src 'self';" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    for path in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        first = client.get("/" + path)
        assert first.status_code == 200 and first.headers["cache-control"] == "no-cache"
        again = client.get("/" + path, headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content


def test_metrics(client, scripted):
    client.post(CHAT, json={"messages": USER})
    client.post(CHAT, json={})
    client.get("/whatever")
    text = client.get("/metrics").text

    def value(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    assert value('nanochat_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert value('nanochat_requests_total{route="/v1/chat/completions",status="400"}') == 1
    assert value('nanochat_requests_total{route="other",status="404"}') == 1
    assert value("nanochat_prompt_tokens_total") == scripted.counters.prompt_tokens == 9
    assert value("nanochat_generated_tokens_total") == len(SCRIPT)
    assert value("nanochat_time_to_first_token_seconds_count") == 1
    assert value('nanochat_request_seconds_count{route="/v1/chat/completions"}') == 2
    assert value("nanochat_requests_in_flight") == 1 and value("nanochat_slots") == 2  # itself
    assert value("nanochat_slots_busy") == value("nanochat_queue_length") == value("nanochat_reused_tokens_total") == 0


def test_engine_failure_is_reported_to_those_who_wait_and_to_health(client, scripted):
    scripted.broken = True
    got = client.post(CHAT, json={"messages": USER})
    assert got.status_code == 500 and "out of memory" in got.json()["error"]["message"]
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    assert client.get("/health").json()["status"] == "failed"
    assert client.post(CHAT, json={"messages": USER}).status_code == 500


def test_engine_failure_ends_a_stream_with_an_error(client, scripted):
    scripted.broken = True
    first, last = stream_of(client.post(CHAT, json={"messages": USER, "stream": True}))
    assert first["choices"] and last["error"]["type"] == "server_error"


# ------------------------------------------------------------------------------------------------ scheduler


def collector():
    updates, ended = [], threading.Event()

    def deliver(index, update):
        updates.append(update)
        if isinstance(update, Exception) or update.completion is not None:
            ended.set()

    return updates, ended, deliver


REQUEST = Request([1, 2], 100)


def test_scheduler_bounds_its_queue_and_counts():
    engine = Scripted(SCRIPT, slots=1, pace=0.02)
    scheduler = Scheduler(engine, max_waiting=1)
    assert not scheduler.ready
    scheduler.start()
    assert scheduler.ready
    first, second = collector(), collector()
    scheduler.submit([REQUEST], first[2])
    scheduler.submit([REQUEST], second[2])
    with pytest.raises(Busy) as busy:
        scheduler.submit([REQUEST], second[2])
    assert busy.value.headers == {"Retry-After": "1"}
    assert first[1].wait(10) and second[1].wait(10)
    assert sum((list(u.ids) for u in second[0]), []) == SCRIPT
    third = collector()
    scheduler.submit([REQUEST], third[2])  # there is room again
    assert third[1].wait(10)
    scheduler.stop()
    assert scheduler.counts() == {"active": 0, "queued": 0} and not scheduler.ready
    with pytest.raises(Stopped):
        scheduler.submit([REQUEST], third[2])


def test_scheduler_compiles_beside_requests_and_no_more_than_one_program_while_there_are_any():
    engine, gate = Scripted(SCRIPT), threading.Event()
    scheduler = Scheduler(engine, likely=[REQUEST])
    got, busy = collector(), type(engine).busy.fget
    engine.step = lambda step=engine.step: gate.wait(10) and step()
    scheduler.submit([REQUEST], got[2])
    scheduler.start()
    wait_for(lambda: busy(engine))
    time.sleep(0.1)
    assert engine.compiled <= 1 and not scheduler.compiled
    gate.set()
    assert got[1].wait(10)
    wait_for(lambda: engine.compiled == 3 and scheduler.compiled)
    scheduler.stop()


def test_scheduler_cancels_and_stops():
    engine = Scripted(SCRIPT * 50, slots=1, pace=0.01)
    scheduler = Scheduler(engine)
    scheduler.start()
    running, waiting, left = collector(), collector(), collector()
    long = Request([1, 2], 10_000)
    [a], [b] = scheduler.submit([long], running[2]), scheduler.submit([long], waiting[2])
    scheduler.cancel(b)
    scheduler.cancel(a)
    assert running[1].wait(10) and waiting[1].wait(10)
    assert running[0][-1].completion.finish_reason == waiting[0][-1].completion.finish_reason == "cancelled"
    scheduler.cancel(a)  # once more: nothing
    scheduler.submit([long], left[2])
    scheduler.stop()
    assert left[1].wait(10) and isinstance(left[0][-1], Stopped)


def test_an_engine_that_fails_at_a_request_leaves_nobody_waiting(monkeypatch):
    def refuse(error):
        monkeypatch.setattr(engine, "submit", lambda request: (_ for _ in ()).throw(error))
        got = collector()
        scheduler.submit([REQUEST], got[2])
        assert got[1].wait(10)
        return got[0][-1]

    engine = Scripted(SCRIPT)
    scheduler = Scheduler(engine)
    scheduler.start()
    assert "does not fit" in str(refuse(ValueError("does not fit"))) and scheduler.ready
    assert isinstance(refuse(TypeError("a bug")), Stopped) and not scheduler.alive


def test_closing_an_answer_cancels_it_in_the_engine():
    engine = Scripted(SCRIPT * 100, slots=1, pace=0.005)
    scheduler = Scheduler(engine)
    app = create_app(scheduler, TOK, INFO)

    async def run():
        async with app.router.lifespan_context(app):
            body = ChatRequest(messages=USER, n=3, max_tokens=100_000)
            answer = Answer(scheduler, TOK, [[1, 2]], body, Metrics(scheduler))
            await anext(answer.shown())
            answer.close()
            await asyncio.to_thread(wait_for, lambda: not any(scheduler.counts().values()))

    asyncio.run(run())
    assert not engine.busy


def test_command_line_serves_what_was_asked_for(tmp_path, monkeypatch):
    made = {}

    def engine(model, **options):
        made.update(options, engine=Scripted(SCRIPT, slots=options["slots"]))
        return made["engine"]

    loaded = SimpleNamespace(model=SimpleNamespace(cfg=SimpleNamespace(sequence_len=192)), tokenizer=TOK, stage="sft")
    monkeypatch.setattr("nanochat_jax.checkpoint.load_model", lambda run, stage, mesh: loaded)
    monkeypatch.setattr("jax.device_count", lambda: 1)
    monkeypatch.setattr("nanochat_jax.devices.use_compilation_cache", lambda path: None)
    monkeypatch.setattr("nanochat_jax.engine.engine.Engine", engine)
    monkeypatch.setattr(Scripted, "generate", lambda self, requests: None, raising=False)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: made.update(app=self.config.app))
    monkeypatch.setenv("NANOCHAT_API_KEY", "sesame")
    options = ["--slots", "3", "--max-waiting", "1", "--int8", "--cors-origin", "https://a.example"]
    assert main(["--run-dir", str(tmp_path / "demo"), "--port", "0", *options]) == 0
    assert made["slots"] == 3 and made["max_len"] == 192 and made["int8"]
    with TestClient(made["app"], headers={"Authorization": "Bearer sesame"}) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "demo/sft"
        assert client.post(CHAT, json={"messages": USER, "n": 5}).status_code == 400
        assert client.post(CHAT, json={"messages": USER, "n": 4}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        origin = client.get("/health", headers={"Origin": "https://a.example"}).headers["access-control-allow-origin"]
        assert origin == "https://a.example"


def test_command_line_errors_are_one_line(tmp_path, capsys):
    run = ["--run-dir", str(tmp_path)]
    assert main([*run, "--port", "0"]) == 2
    taken = bind("127.0.0.1", 0)
    taken.listen()
    assert main([*run, "--port", str(taken.getsockname()[1])]) == 2
    assert main([*run, "--slots", "0"]) == main([*run, "--max-waiting", "-1"]) == 2
    errors = capsys.readouterr().err.strip().split("\n")
    assert len(errors) == 4 and "not a run directory" in errors[0] and "take another --port" in errors[1]
    assert "--slots 0" in errors[2] and "--max-waiting -1" in errors[3]
