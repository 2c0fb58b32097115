"""OpenAI's responses API, by bodies that clients send and by OpenAI's own client."""

import json

import pytest
from fastapi.testclient import TestClient
from server_fakes import TOK, Scripted, scripted_app, serving

from server.responses import Kept

PATH = "/v1/responses"
HI = [TOK.user_start, *b"hi", TOK.user_end]


@pytest.fixture(scope="module")
def engine():
    return Scripted("gr\u00fc\u00df dich".encode())


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(scripted_app(None, engine=engine)[0]) as client:
        yield client


SAID = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 2}'}
PYTHON = [TOK.python_start, *b"f(a=2)", TOK.python_end, TOK.output_start, *b"4", TOK.output_end]
INPUTS = {
    "text": ({"input": "hi"}, HI),
    "a message": ({"input": [{"role": "user", "content": "hi"}]}, HI),
    "a message with its type": ({"input": [{"type": "message", "role": "user", "content": "hi"}]}, HI),
    "parts behind a system message": (
        {
            "input": [
                {"role": "system", "content": "Be short"},
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            ]
        },
        [TOK.user_start, *b"Be short\n\nhi", TOK.user_end],
    ),
    "instructions": ({"input": "hi", "instructions": "Be"}, [TOK.user_start, *b"Be\n\nhi", TOK.user_end]),
    "a call and its result": (
        {
            "input": [
                {"role": "user", "content": "hi"},
                CALL,
                {"type": "function_call_output", "call_id": "1", "output": "4"},
            ]
        },
        [*HI, TOK.assistant_start, *PYTHON],
    ),
    "what was said before": (
        {
            "input": [
                {"role": "user", "content": "hi"},
                {"type": "reasoning", "id": "r", "summary": []},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "yes", "annotations": []}],
                },
                {"role": "user", "content": "hi"},
            ]
        },
        [*HI, TOK.assistant_start, *b"yes", TOK.assistant_end, *HI],
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_form(client, engine, name):
    body, ids = INPUTS[name]
    got = client.post(PATH, json={"model": "x", "max_output_tokens": 16, **body})
    assert got.status_code == 200
    end = [] if ids[-1] == TOK.output_end else [TOK.assistant_start]
    assert engine.seen[-1].ids == [TOK.bos, *ids, *end] and engine.seen[-1].max_new_tokens == 16


def test_a_whole_response(client):
    got = client.post(PATH, json={"input": "hi", "store": False, "include": ["reasoning.encrypted_content"]})
    said = got.json()
    assert said["status"] == "completed" and said["object"] == "response" and said["store"] is False
    [item] = said["output"]
    assert item["content"] == [
        {"type": "output_text", "text": "gr\u00fc\u00df dich", "annotations": [], "logprobs": []}
    ]
    assert said["usage"]["input_tokens"] == 6 and said["usage"]["output_tokens"] == 11
    assert got.headers["X-Ignored-Fields"] == "include"
    cut = client.post(PATH, json={"input": "hi", "max_output_tokens": 3}).json()
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_an_item_may_be_referred_to(client, engine):
    said = client.post(PATH, json={"input": "hi"}).json()
    assert said["store"] is True
    reference = {"type": "item_reference", "id": said["output"][0]["id"]}
    user = {"role": "user", "content": "hi"}
    assert client.post(PATH, json={"input": [user, reference, user]}).status_code == 200
    whole = [*HI, TOK.assistant_start, *"gr\u00fc\u00df dich".encode(), TOK.assistant_end, *HI]
    assert engine.seen[-1].ids == [TOK.bos, *whole, TOK.assistant_start]
    text = client.post(PATH, json={"input": "hi", "stream": True, "store": False}).text
    forgotten = json.loads(text.split("data: ")[-1])["response"]["output"][0]["id"]
    for id in (forgotten, "msg_1", None):
        got = client.post(PATH, json={"input": [user, {"type": "item_reference", "id": id}, user]})
        assert got.status_code == 400 and "send it whole" in got.json()["error"]["message"]
    kept = Kept(most=2)
    for id in "abc":
        kept.add({"id": id})
    assert [kept._items.get(id) for id in "abc"] == [None, {"id": "b"}, {"id": "c"}]


def test_a_conversation_that_had_to_be_cut_is_said(client):
    got = client.post(PATH, json={"input": "x" * 500}).json()
    assert got["context"] == {"dropped_messages": 0, "truncated": True}


def test_a_streamed_response(client):
    text = client.post(PATH, json={"input": "hi", "stream": True}).text
    events = [event.split("\n") for event in text.split("\n\n") if event]
    found = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [e["type"] for e in found]
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    deltas = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "gr\u00fc\u00df dich" and len(deltas) > 1
    order = list(dict.fromkeys(e["type"].removeprefix("response.") for e in found))
    assert order == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    whole = client.post(PATH, json={"input": "hi"}).json()
    assert found[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"input": []}, "at least 1"),
        ({"input": [{"type": "image_generation_call"}]}, "an item of type 'image_generation_call'"),
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"text": {"format": {"type": "xml"}}}, "json_object and json_schema are known"),
        ({"tool_choice": "required"}, "there is no function to call in tools"),
        ({"n": 2}, "n is not supported: a response is one answer"),
    ],
)
def test_what_cannot_be_done_is_refused(client, more, says):
    got = client.post(PATH, json={"input": "hi", **more})
    assert got.status_code == 400 and says in got.json()["error"]["message"]


def test_an_engine_that_fails_says_so_in_the_stream():
    engine = Scripted(b"ab" * 50)
    engine.broken = True
    with TestClient(scripted_app(None, engine=engine)[0]) as client:
        text = client.post(PATH, json={"input": "hi", "stream": True}).text
    assert "event: response.failed" in text and "out of memory" in text


def test_openais_client(engine):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    with serving(scripted_app(None, engine=engine)[0]) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        assert client.responses.create(model="x", input="hi").output_text == "gr\u00fc\u00df dich"
        with client.responses.stream(model="x", input="hi") as stream:
            said = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert "".join(said) == stream.get_final_response().output_text == "gr\u00fc\u00df dich"
