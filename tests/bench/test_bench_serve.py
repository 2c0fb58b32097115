"""The clients of `bench serve`, against a server that streams what it is told to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat_jax.bench import serve
from nanochat_jax.bench.__main__ import main

CHUNK = {"choices": [{"delta": {"content": "Hi"}, "finish_reason": None}]}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.server.says else 503)
            self.end_headers()
            for part in self.server.says:
                line = part if isinstance(part, str) else json.dumps(part)
                self.wfile.write(f"data: {line}\n\n".encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_whole_answers_are_counted(server, capsys):
    server.says = [CHUNK, END, USAGE, "[DONE]"]
    url = f"http://127.0.0.1:{server.server_port}"
    assert main(["serve", "--url", url, "--clients", "2", "--seconds", "0.3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["clients"]["2"]
    assert found["answers"] >= 2 and found["errors"] == 0 and found["tokens_per_second"] > 0
    assert 0 < found["first_token_seconds"]["p50"] <= found["answer_seconds"]["p99"]


@pytest.mark.parametrize(
    "says, error",
    [
        ([], "status 503"),
        ([CHUNK], "broke off"),
        ([CHUNK, "[DONE]"], "without a finish_reason"),
        ([{"error": {"message": "overloaded"}}], "overloaded"),
    ],
)
def test_anything_but_a_whole_answer_is_an_error(server, says, error):
    server.says = says
    answers, errors = serve.over_http(f"http://127.0.0.1:{server.server_port}")(1, 0.05)
    assert not answers and errors and error in errors[0]
