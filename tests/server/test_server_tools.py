"""Forms that an answer keeps to, and calls of the caller's tools, as clients ask for them. The model's words are
nonsense; what it says fits all the same."""

import json
import re
import subprocess
import sys

import jsonschema_rs
import openai
import pytest
from evals_fakes import ByteTokenizer, tiny_model
from fastapi.testclient import TestClient
from server_fakes import USER, Scripted, scripted_app, serving

from conftest import ROOT
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.grammar import Form

TOK = ByteTokenizer()
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "null"},
    },
    "required": ["city", "unit"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
FLAT = [{"type": "function", "name": "weather", "parameters": WEATHER}, {"type": "web_search"}]
NAMED = {"type": "function", "function": {"name": "weather"}}
HOT = {"messages": USER, "temperature": 1, "max_tokens": 120}


@pytest.fixture(scope="module")
def client():
    with TestClient(scripted_app(None, engine=Engine(tiny_model(sequence_len=768), slots=4, max_len=768))[0]) as client:
        yield client


@pytest.fixture(scope="module")
def thinking():
    app, engine = scripted_app(b"<think> It is a question. </think> Yes.")
    with TestClient(app) as client:
        yield client, engine.seen


@pytest.fixture(scope="module")
def app_seen():
    app, engine = scripted_app(b"", engine=Scripted(b"Yes.", max_len=768))
    with TestClient(app) as client:
        yield client, engine.seen


def said(client, path=CHAT, **body):
    got = client.post(path, json=body)
    assert got.status_code == 200, got.text
    assert "X-Ignored-Fields" not in got.headers
    return got.json()


def events(client, path=CHAT, **body):
    text = client.post(path, json={**body, "stream": True}).text
    found = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(event) for event in found if event != "[DONE]"]


@pytest.mark.parametrize(
    "form, schema",
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "A", "strict": True, "schema": ANSWER}}, ANSWER),
    ],
    ids=["json_object", "json_schema"],
)
def test_an_answer_is_json_of_the_form(client, form, schema):
    for seed in range(5):
        [choice] = said(client, **HOT, response_format=form, seed=seed)["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema_rs.validate(schema, json.loads(choice["message"]["content"]))
        parts = events(client, **HOT, response_format=form, seed=seed)
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == choice["message"]["content"]
    [a, b] = said(client, **HOT, response_format=form, n=2, logprobs=True)["choices"]
    assert all(isinstance(json.loads(c["message"]["content"]), dict) and c["logprobs"]["content"] for c in (a, b))
    text = said(client, "/v1/completions", prompt="x", max_tokens=120, response_format=form)["choices"][0]["text"]
    jsonschema_rs.validate(schema, json.loads(text))
    echoed = said(client, "/v1/completions", prompt="x", max_tokens=1, temperature=0, echo=True, response_format=form)
    assert echoed["choices"][0]["text"] == "x{"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        NAMED,
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
    ],
    ids=["required", "named", "allowed"],
)
def test_a_call_that_is_required_comes_and_is_valid(client, choice):
    for seed in range(5):
        body = {**HOT, "tools": TOOLS, "tool_choice": choice, "seed": seed}
        [whole] = said(client, **body)["choices"]
        assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
        [call] = whole["message"]["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        jsonschema_rs.validate(WEATHER if name == "weather" else {"maxProperties": 0}, json.loads(arguments))
        assert name == "weather" or choice == "required"

        found = [event["choices"][0] for event in events(client, **body)]
        deltas = [d for c in found for d in c["delta"].get("tool_calls", [])]
        assert found[-1]["finish_reason"] == "tool_calls" and {d["index"] for d in deltas} == {0}
        assert deltas[0]["id"] and deltas[0]["function"]["name"] == name and deltas[0]["type"] == "function"
        assert all(d.keys() == {"index", "function"} for d in deltas[1:])
        assert "".join(d["function"]["arguments"] for d in deltas) == arguments


CALLING = {"logit_bias": {str(TOK.python_start): 100, "119": 5, "110": 5}}  # it calls something, rather w or n


def test_where_text_may_be_the_answer_a_call_is_valid_as_well(client):
    called = 0
    for seed in range(12):
        body = {**HOT, **CALLING, "tools": TOOLS, "seed": seed}
        [whole] = said(client, **body)["choices"]
        found = [event["choices"][0] for event in events(client, **body)]
        if whole["finish_reason"] != "tool_calls":  # the calculator was called instead, and knew no answer
            told = "".join(t.get("input", "") for c in found for t in c["delta"].get("tool", []))
            assert told in "".join(call["input"] for call in whole["message"]["tool"])
            continue
        called += 1
        [call] = whole["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        jsonschema_rs.validate(WEATHER if name == "weather" else {"maxProperties": 0}, json.loads(arguments))
        deltas = [d for c in found for d in c["delta"].get("tool_calls", [])]
        assert found[-1]["finish_reason"] == "tool_calls" and deltas[0]["function"]["name"] == name
        assert "".join(d["function"]["arguments"] for d in deltas) == arguments
    assert called > 3
    [text] = said(client, **HOT, tools=TOOLS, logit_bias={str(TOK.python_start): -100}, seed=1)["choices"]
    assert "tool_calls" not in text["message"] and text["message"]["content"]


def test_the_prompt_tells_of_tools_and_results(app_seen):
    client, seen = app_seen
    history = [
        {"role": "system", "content": "Be kind."},
        USER[0],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **NAMED, "function": {"name": "now"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    client.post(CHAT, json={"messages": history, "tools": TOOLS, "reasoning_effort": "high"})
    said = "".join(chr(i) if i < 256 else f"<{i}>" for i in seen[-1].ids)
    first = 'Think first.\ndef weather(city: Annotated[str, {"maxLength": 9}], unit: '
    assert said.startswith(f"<{TOK.bos}><{TOK.user_start}>{first}") and "def now(): ...\n\nBe kind.\n\n" in said
    called = f"now()<{TOK.python_end}><{TOK.output_start}>noon<{TOK.output_end}>"
    assert said.endswith(f"<{TOK.assistant_start}><{TOK.python_start}>{called}")
    client.post(CHAT, json={"messages": USER, "tools": TOOLS, "tool_choice": "none"})
    assert "def" not in "".join(map(chr, (i for i in seen[-1].ids if i < 256)))


def test_thoughts_are_told_apart(thinking):
    client, seen = thinking
    got = client.post(CHAT, json={"messages": USER, "reasoning_effort": "high"}).json()
    [choice] = got["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Yes.", "reasoning_content": "It is a question."}
    assert got["usage"]["completion_tokens_details"] == {"reasoning_tokens": 27}  # bytes, with the mark at their end
    found = [e["choices"][0]["delta"] for e in events(client, messages=USER, enable_thinking=True)]
    assert "".join(d.get("reasoning_content", "") for d in found) == "It is a question."
    assert "".join(d.get("content", "") for d in found) == "Yes."
    output = said(client, RESPONSES, input="hi", reasoning={"effort": "high"})["output"]
    assert [(item["type"], item["content"][0]["text"]) for item in output] == [
        ("reasoning", "It is a question."),
        ("message", "Yes."),
    ]
    found = events(client, RESPONSES, input="hi", reasoning={"effort": "high"})
    kinds = list(dict.fromkeys(e["type"].removeprefix("response.") for e in found))
    assert kinds[2:] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done", "output_text.delta", "output_text.done", "completed",
    ]  # fmt: skip
    assert [e["output_index"] for e in found if e["type"].endswith("item.done")] == [0, 1]
    client.post(CHAT, json={"messages": [*USER, choice["message"], *USER]})
    assert b"question" not in bytes(i for i in seen[-1].ids if i < 256)


@pytest.mark.parametrize(
    "asked, line, budget",
    [
        ({}, None, None),
        ({"reasoning_effort": "none"}, None, None),
        ({"reasoning_effort": "low"}, "Think first, in at most 24 tokens.", 24),
        ({"reasoning_effort": "high", "enable_thinking": False}, None, None),
        ({"enable_thinking": True, "thinking_budget": 7}, "Think first, in at most 7 tokens.", 7),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "Think first.", None),
        ({"thinking_budget": 0, "reasoning_effort": "high"}, None, None),
    ],
)
def test_who_asks_for_thoughts_gets_them(thinking, asked, line, budget):
    client, seen = thinking
    got = client.post(CHAT, json={"messages": USER, **asked})
    assert got.status_code == 200 and "X-Ignored-Fields" not in got.headers
    text = bytes(i for i in seen[-1].ids if i < 256).decode()
    assert text == (f"{line}\n\n" if line else "") + USER[0]["content"]
    assert getattr(seen[-1].tool, "_budget", None) == budget


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"reasoning_effort": "much"}, "reasoning_effort: none, minimal, low"),
        ({"reasoning": {"effort": ["low"]}}, "reasoning_effort: none, minimal, low"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking is true or false, not 'no'"),
        ({"chat_template_kwargs": {"thinking_budget": -1}}, "thinking_budget is a number of tokens, not -1"),
    ],
)
def test_what_says_nothing_of_thoughts_is_refused(thinking, asked, why):
    got = thinking[0].post(CHAT, json={"messages": USER, **asked})
    assert got.status_code == 400 and why in got.json()["error"]["message"]


def test_what_of_thoughts_is_left_out_is_named(thinking):
    client, _ = thinking
    more = {"reasoning": {"effort": "high", "summary": "auto"}, "chat_template_kwargs": {"tone": "kind"}}
    said = [USER[0], {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, USER[0]]
    got = client.post(CHAT, json={"messages": said, **more})
    assert got.headers["X-Ignored-Fields"] == "reasoning.summary, chat_template_kwargs.tone"
    form = {"response_format": {"type": "json_object"}, "enable_thinking": True, "reasoning_effort": "none"}
    got = client.post(CHAT, json={"messages": USER, **form})
    assert got.headers["X-Ignored-Fields"] == "enable_thinking"


def test_a_schema_that_no_grammar_keeps_to_is_named_and_the_call_is_json_all_the_same(client):
    odd = {"type": "object", "properties": {"l": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": odd}}]
    body = {"messages": USER, "max_tokens": 200, "temperature": 1, "tools": tools, **CALLING}
    seen = 0
    for seed in range(8):
        got = client.post(CHAT, json={**body, "seed": seed})
        assert got.status_code == 200 and got.headers["X-Ignored-Fields"] == "tools.weather.parameters"
        for call in got.json()["choices"][0]["message"].get("tool_calls", []):
            if got.json()["choices"][0]["finish_reason"] == "tool_calls":
                seen += isinstance(json.loads(call["function"]["arguments"]), dict)
    assert seen


@pytest.mark.parametrize(
    "script, told",
    [
        ([TOK.output_start, *b"7", TOK.output_end], {"name": "calculator", "output": "7"}),
        (
            [TOK.python_start, *b"we", TOK.python_end, TOK.output_start, *b"7", TOK.output_end],
            {"name": "calculator", "input": "we", "output": "7"},
        ),
        ([TOK.python_start, *b"wet+1", TOK.python_end], {"name": "calculator", "input": "wet+1"}),
    ],
    ids=["a result without a call", "a name that is not whole", "another name"],
)
def test_what_is_no_call_of_the_callers_is_shown_as_the_calculators(script, told):
    with TestClient(scripted_app(b"", engine=Scripted([*script, *b"ok"], max_len=768))[0]) as client:
        found = [e["choices"][0] for e in events(client, messages=USER, tools=TOOLS)]
    deltas = [d for c in found for d in c["delta"].get("tool", [])]
    joined = {key: "".join(d.get(key, "") for d in deltas) for key in told}
    assert joined == told and found[-1]["finish_reason"] == "stop"
    assert "".join(c["delta"].get("content", "") for c in found) == "ok"


class Agent(Scripted):
    """Calls a tool, and says something about what comes of it."""

    def advance(self, ticket):
        answered = TOK.output_end in ticket.prompt
        call = [TOK.python_start, *b'weather(city="Oslo")', TOK.python_end]
        self.script = list(b" The weather in Oslo is snowy.") if answered else [*b"About weather", *call]
        return super().advance(ticket)


def test_the_readme_s_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "server" / "README.md").read_text(), re.DOTALL)[1]
    with serving(scripted_app(b"", engine=Agent(b"", max_len=768))[0]) as url:
        assert "http://127.0.0.1:8000" in code
        command = [sys.executable, "-c", code.replace("http://127.0.0.1:8000", url)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.stdout == "The weather in Oslo is snowy.\n", said.stderr


def test_a_response_is_a_call_or_keeps_to_a_form(client):
    body = {"input": "hi", "temperature": 1, "max_output_tokens": 120, "seed": 3}
    got = client.post(RESPONSES, json={**body, "tools": FLAT, "tool_choice": "required"})
    assert got.headers["X-Ignored-Fields"] == "tools.web_search"
    [item] = got.json()["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    jsonschema_rs.validate(WEATHER, json.loads(item["arguments"]))
    found = events(client, RESPONSES, **body, tools=FLAT, tool_choice={"type": "function", "name": "weather"})
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    order = list(dict.fromkeys(e["type"].removeprefix("response.") for e in found))
    assert order == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    deltas = "".join(e["delta"] for e in found if e["type"].endswith("arguments.delta"))
    done = found[-1]["response"]["output"][0]
    assert deltas == done["arguments"] == item["arguments"] and found[2]["item"]["call_id"] == done["call_id"]
    form = {"format": {"type": "json_schema", "name": "A", "schema": ANSWER}}
    [item] = said(client, RESPONSES, **body, text=form)["output"]
    jsonschema_rs.validate(ANSWER, json.loads(item["content"][0]["text"]))


@pytest.mark.parametrize(
    "more, says",
    [
        ({"tool_choice": "required"}, "tool_choice is 'required', and there is no function to call in tools"),
        ({"tool_choice": NAMED, "tools": TOOLS[1:]}, "tool_choice wants 'weather', which is none of"),
        ({"tool_choice": 7, "tools": TOOLS}, "tool_choice wants 7"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a b"}}]}, "needs a name"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": 3}}, "tool_choice wants 3"),
        ({"tool_choice": {"type": "function", "function": 3}, "tools": TOOLS}, "tool_choice wants "),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": 3}]}, "needs a name"),
        ({"response_format": {"type": "json_schema"}}, "json_schema needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": 3}}, "json_schema needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format: "),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}}, "response_format: "),
        ({"response_format": "json"}, "text, json_object and json_schema are known"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_in_one_line(client, more, says):
    got = client.post(CHAT, json={**HOT, **more})
    message = got.json()["error"]["message"]
    assert got.status_code == 400 and says in message and "\n" not in message


def test_a_form_that_is_too_much_ends_its_own_answer_alone(client, monkeypatch):
    body = {**HOT, "response_format": {"type": "json_schema", "json_schema": {"schema": ANSWER}}}
    with monkeypatch.context() as broken:
        broken.setattr(Form, "take", lambda *_: False)
        broken.setattr(Form, "failed", "it takes too long")
        got = client.post(CHAT, json=body)
        assert got.status_code == 400 and "the form that was asked for: it takes too long" in got.text
        assert "it takes too long" in events(client, **body)[-1]["error"]["message"]
        assert events(client, RESPONSES, input="hi", text={"format": {"type": "json_object"}})[-1]["response"]["error"]
    assert said(client, **body)["choices"][0]["finish_reason"] == "stop"


def test_openai_s_client_reads_calls_and_forms():
    with serving(scripted_app(None, engine=Engine(tiny_model(), slots=2, max_len=192))[0]) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
        body = {"model": "x", "messages": USER, "temperature": 1, "max_tokens": 120, "seed": 1}
        with client.chat.completions.stream(**body, tools=TOOLS, tool_choice="required") as stream:
            call = stream.get_final_completion().choices[0].message.tool_calls[0]
        whole = client.chat.completions.create(**body, tools=TOOLS, tool_choice="required").choices[0].message
        assert whole.tool_calls[0].function.arguments == call.function.arguments
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        body["messages"] = [*USER, whole.model_dump(), result]
        assert client.chat.completions.create(**body).choices[0].message.content is not None
