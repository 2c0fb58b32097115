"""What clients send beside the question: what asks for nothing changes nothing, what is not known is named, and
conversations of every order are turned into ours. The bodies are those that clients were seen to send."""

import gzip
import http.client
import json
import re

import numpy as np
import pytest
from evals_fakes import FullLogits, tiny_model
from fastapi.testclient import TestClient
from server_fakes import TOK, USER, Scripted, scripted_app, serving

from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.sampling import Shaping

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def engine():
    return Scripted(b"yes")


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(scripted_app(None, engine=engine)[0]) as client:
        yield client


NOTHING = {
    "tools": [],
    "tool_choice": "none",
    "functions": None,
    "function_call": "none",
    "parallel_tool_calls": None,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "modalities": ["text"],
    "audio": None,
    "store": False,
    "metadata": None,
    "stream_options": None,
    "stop": [],
}
HARMLESS = {
    "parallel_tool_calls": True,
    "verbosity": "low",
    "service_tier": "auto",
    "prediction": {"type": "content", "content": "x"},
    "safety_identifier": "a",
    "prompt_cache_key": "b",
    "store": True,
    "best": 1,
    "options": {"num_ctx": 4096},
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_asks_for_nothing_changes_nothing(client, engine, name):
    for value in (NOTHING[name], None):
        got = client.post(CHAT, json={"messages": USER, "seed": 1, name: value})
        assert got.status_code == 200 and "X-Ignored-Fields" not in got.headers
        assert engine.seen[-1] == engine.seen[0]
    text = {"suffix": "", "echo": False, "best_of": 1, "logprobs": None}
    got = client.post(TEXT, json={"prompt": "x", **text})
    assert got.status_code == 200 and "X-Ignored-Fields" not in got.headers


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_known_is_left_out_named_and_counted(client, engine, stream):
    def counted():
        return float(re.search(r"^nanochat_ignored_fields_total (\S+)", client.get("/metrics").text, re.M)[1])

    before, body = counted(), {"messages": USER, "seed": 1, "stream": stream}
    got = client.post(CHAT, json={**body, **HARMLESS})
    assert got.status_code == 200 and got.headers["X-Ignored-Fields"] == ", ".join(HARMLESS)
    assert counted() == before + len(HARMLESS) and engine.seen[-1] == engine.seen[0]
    got = client.post(CHAT, json={**body, "a\nb\u00e9": 1, "stream_options": {"include_obfuscation": True}})
    assert got.headers["X-Ignored-Fields"] == "a?b?, stream_options.include_obfuscation"
    got = client.post("/tokenize", json={"prompt": "a", "mood": "good"})
    assert got.headers["X-Ignored-Fields"] == "mood"
    got = client.post(CHAT, json={**body, "messages": [{**USER[0], "name": "me", "mood": "good"}]})
    assert got.headers["X-Ignored-Fields"] == "messages.mood"


def test_strict_refuses_what_is_not_known():
    with TestClient(scripted_app(b"yes", strict=True)[0]) as client:
        got = client.post(CHAT, json={"messages": USER, "verbosity": "low"})
        assert got.status_code == 400 and got.json()["error"]["message"] == "unknown field verbosity"
        assert got.json()["error"]["param"] == "verbosity"
        assert client.post(CHAT, json={"messages": USER, "tools": []}).status_code == 200


@pytest.mark.parametrize(
    "more",
    [
        {"suffix": "x"},
        {"audio": {"voice": "a"}},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(client, engine, more):
    seen = len(engine.seen)
    got = client.post(CHAT, json={"messages": USER, **more})
    name = next(iter(more))
    assert got.status_code == 400 and f"{name} is not supported: " in got.json()["error"]["message"]
    assert len(engine.seen) == seen


def user(text):
    return [TOK.user_start, *text.encode(), TOK.user_end]


def said(text, end=True):
    return [TOK.assistant_start, *text.encode(), *([TOK.assistant_end] if end else [])]


def python(call, output):
    return [TOK.python_start, *call.encode(), TOK.python_end, TOK.output_start, *output.encode(), TOK.output_end]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
ECHOED = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "parsed": None}
ORDERS = {
    "two system messages": ([turn("system", "A"), turn("developer", "B"), *USER], user("A\n\nB\n\nhello")),
    "a later system message": (
        [*USER, turn("assistant", "yes"), turn("system", "B"), turn("user", "and?")],
        user("hello") + said("yes") + user("B\n\nand?"),
    ),
    "two user messages": ([*USER, turn("user", "you")], user("hello\n\nyou")),
    "an assistant first": ([turn("assistant", "Hi!"), *USER], user("") + said("Hi!") + user("hello")),
    "an assistant last, empty": ([*USER, turn("assistant", "")], user("hello")),
    "a system message alone": ([turn("system", "Be kind.")], user("Be kind.\n\n")),
    "echoed": (
        [turn("user", "a", name="me"), turn("assistant", "b", reasoning_content="hm", **ECHOED), *USER],
        user("a") + said("b") + user("hello"),
    ),
    "null": ([turn("user", "a"), turn("assistant", None, tool_calls=None), *USER], user("a\n\nhello")),
    "parts": (
        [
            turn(
                "user",
                [
                    {"type": "text", "text": "hel", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "lo"},
                ],
            )
        ],
        user("hello"),
    ),
    "the calculator's": (
        [
            turn("user", "a"),
            turn("assistant", "b", tool=[{"index": 0, "name": "c", "input": "1", "output": "1"}]),
            *USER,
        ],
        user("a") + said("b") + user("hello"),
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_conversations_in_every_order(client, engine, name):
    messages, ids = ORDERS[name]
    got = client.post(CHAT, json={"messages": messages})
    assert got.status_code == 200 and engine.seen[-1].ids == [TOK.bos, *ids, TOK.assistant_start]


def test_what_the_assistant_began_is_gone_on_with(client, engine):
    assert client.post(CHAT, json={"messages": [*USER, turn("assistant", "Well, ")]}).status_code == 200
    assert engine.seen[-1].ids == [TOK.bos, *user("hello"), *said("Well, ", end=False)]
    long = client.post(CHAT, json={"messages": [*USER, turn("assistant", "x" * 500)], "max_tokens": 8})
    assert long.status_code == 200 and long.json()["context"]["truncated"]
    assert engine.seen[-1].ids[:8] == [TOK.bos, *user("hello")] and engine.seen[-1].ids[-9:] == [*b"x" * 9]


def test_calls_of_tools_and_their_results_are_history(client, engine):
    history = [*USER, turn("assistant", None, tool_calls=[CALL]), turn("tool", "4", tool_call_id="1")]
    assert client.post(CHAT, json={"messages": history}).status_code == 200
    assert engine.seen[-1].ids == [TOK.bos, *user("hello"), TOK.assistant_start, *python("f(a=2)", "4")]
    assert client.post(CHAT, json={"messages": [*history, turn("assistant", "Four."), *USER]}).status_code == 200
    want = [TOK.assistant_start, *python("f(a=2)", "4"), *b"Four.", TOK.assistant_end, *user("hello")]
    assert engine.seen[-1].ids == [TOK.bos, *user("hello"), *want, TOK.assistant_start]


def test_what_shapes_the_logits_reaches_the_engine(client, engine):
    more = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "min_p": 0.1}
    assert client.post(CHAT, json={"messages": USER, **more, "logit_bias": {"5": -100, "7": 0}}).status_code == 200
    assert engine.seen[-1].shaping == Shaping(0.5, -1.0, 1.2, 0.1, ((5, -100.0),))
    for wrong in ({"9999": 1}, {"a": 1}, {"5": 101}, [5]):
        got = client.post(CHAT, json={"messages": USER, "logit_bias": wrong})
        assert got.status_code == 400 and "logit_bias" in got.json()["error"]["message"]
    assert client.post(CHAT, json={"messages": USER, "min_p": 2}).status_code == 400


def test_limits_that_clients_pass(client, engine):
    assert client.post(CHAT, json={"messages": USER, "stop": list("abcde"), "top_p": 0}).status_code == 200
    assert 0 < engine.seen[-1].top_p < 1e-6


# ------------------------------------------------------------------------------------------------ the transport

BODY = json.dumps({"messages": USER, "max_tokens": 3}).encode()


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=x"}]
)
def test_a_body_is_json_whatever_its_header_says(client, headers):
    assert client.post(CHAT, content=BODY, headers=headers).status_code == 200
    assert client.post(CHAT + "/", content=BODY, headers=headers).status_code == 200


def test_a_body_may_be_gzip(client):
    zipped = {"Content-Encoding": "gzip"}
    assert client.post(CHAT, content=gzip.compress(BODY), headers=zipped).status_code == 200
    assert client.post(CHAT, content=BODY, headers=zipped).status_code == 400
    assert client.post(CHAT, content=gzip.compress(b" " * 3_000_000), headers=zipped).status_code == 413


def test_head_is_answered(client):
    for path in ("/health", "/ready", "/v1/models", "/"):
        got = client.head(path)
        assert got.status_code == 200 and not got.content


def test_bearer_may_be_written_small():
    with TestClient(scripted_app(b"yes", api_key="sesame")[0]) as client:
        for scheme, status in (("bearer", 200), ("BEARER", 200), ("Basic", 401)):
            assert client.get("/v1/models", headers={"Authorization": f"{scheme} sesame"}).status_code == status


def test_a_stream_to_a_client_of_http_1_0_is_not_cut_in_chunks(monkeypatch):
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn", 10)
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", "HTTP/1.0")
    with serving(scripted_app(b"yes")[0]) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", CHAT, json.dumps({"messages": USER, "stream": True}))
        got = connection.getresponse()
        assert "Transfer-Encoding" not in got.headers and got.read().startswith(b"data: {")


def test_who_waits_hears_that_the_server_lives(monkeypatch):
    monkeypatch.setattr("server.answer.SILENCE", 0.05)
    app, _ = scripted_app(None, engine=Scripted(b"ab" * 50, slots=1, pace=0.3))
    with serving(app) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", CHAT, json.dumps({"messages": USER, "stream": True, "max_tokens": 6}))
        read = connection.getresponse().read()
    assert read.startswith(b'data: {"id"') and b": waiting\n\n" in read and read.endswith(b"data: [DONE]\n\n")


# --------------------------------------------------------------------------------------- completions, scores, tokens


def test_several_prompts_as_texts_and_ids(client, engine):
    for prompt, want in (
        (["a", "bc"], [b"a", b"bc"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [TOK.bos, 8]], [[5, 6], [8]]),
    ):
        got = client.post(TEXT, json={"prompt": prompt, "max_tokens": 2, "n": 2, "seed": 1}).json()
        assert [c["index"] for c in got["choices"]] == list(range(2 * len(want)))
        asked = [r.ids for r in engine.seen[-2 * len(want) :]]
        assert asked == [[TOK.bos, *ids] for ids in want for _ in range(2)]
        assert got["usage"]["prompt_tokens"] == sum(len(ids) + 1 for ids in want)
    for prompt in ([], [[]], [9999], ["a", 5], [-1]):
        assert client.post(TEXT, json={"prompt": prompt}).status_code == 400


def test_tokens_of_texts_and_back(client):
    got = client.post("/tokenize", json={"prompt": "test", "add_special_tokens": False})
    assert got.json() == {"tokens": [*b"test"], "count": 4, "max_model_len": 192}
    assert client.post("/tokenize", json={"prompt": "a"}).json()["tokens"] == [TOK.bos, *b"a"]
    assert client.post("/tokenize", json={"prompt": "<|bos|>"}).json()["tokens"] == [TOK.bos]
    want = [TOK.bos, *user("hello"), TOK.assistant_start]
    assert client.post("/tokenize", json={"messages": USER}).json()["tokens"] == want
    assert client.post("/detokenize", json={"tokens": [*b"test"]}).json() == {"prompt": "test"}
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|bos|>"


@pytest.fixture(scope="module")
def real():
    """A real engine, its server, and the model's own logits."""
    model = tiny_model()
    engine = Engine(model, slots=2, max_len=192)
    with TestClient(scripted_app(None, engine=engine)[0]) as client:
        yield client, FullLogits(model)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_scores_of_a_prompt_are_the_models(real, length):
    client, full = real
    text = "the quick brown fox jumps over it, " * 5
    text = text[:length]
    body = {"prompt": text, "max_tokens": 1, "logprobs": 2, "echo": True, "temperature": 0, "seed": 1}
    [choice] = client.post(TEXT, json=body).json()["choices"]
    z = full([TOK.bos, *text.encode()])
    logp = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    told, best = choice["logprobs"], logp.argmax(-1)
    want = [logp[i, id] for i, id in enumerate([*text.encode(), best[-1]])]
    assert len(told["tokens"]) == length + 1 and told["tokens"][:length] == list(text)
    np.testing.assert_allclose(told["token_logprobs"], want, atol=2e-4)
    assert told["text_offset"] == list(range(length + 1))
    for top, logprob, id, b in zip(told["top_logprobs"], told["token_logprobs"], [*text.encode(), best[-1]], best):
        assert len(top) == 2 and (logprob == max(top.values())) == (id == b)
    none = client.post(TEXT, json={**body, "max_tokens": 0}).json()["choices"][0]
    assert none["text"] == text and none["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]


def test_an_echo_before_an_answer(real):
    client, _ = real
    plain = client.post(TEXT, json={"prompt": "abc", "max_tokens": 5, "temperature": 0, "logprobs": 1}).json()[
        "choices"
    ][0]
    both = client.post(
        TEXT, json={"prompt": "abc", "max_tokens": 5, "temperature": 0, "logprobs": 1, "echo": True}
    ).json()["choices"][0]
    assert both["text"] == "abc" + plain["text"]
    assert both["logprobs"]["tokens"][3:] == plain["logprobs"]["tokens"]
    assert both["logprobs"]["text_offset"][3:] == [3 + at for at in plain["logprobs"]["text_offset"]]
    assert client.post(TEXT, json={"prompt": "abc", "echo": True, "stream": True}).status_code == 400
