"""The HTTP side: OpenAI's chat completions and completions, what watches them, and the page."""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest

from nanochat_jax.chats import system_text
from nanochat_jax.engine import dialogue
from nanochat_jax.engine.grammar import Grammar, Mixed, Vocabulary
from nanochat_jax.engine.tools import Tools
from server import errors, schemas, tools
from server.answer import Answer
from server.edge import Edge
from server.errors import ApiError
from server.metrics import Metrics
from server.replies import ChatShape, TextShape, echo, reply, scored
from server.responses import Kept, ResponsesRequest, respond
from server.scheduler import Scheduler
from server.schemas import ChatRequest, CompletionRequest

POSTED = (400, 401, 408, 413, 429, 500)  # what a request that posts a body may be answered with, beside 200
EXPOSED = ["Retry-After", "X-Ignored-Fields"]  # to pages of other origins
SHORT_TEXT = 4000  # characters that are tokenized in about a millisecond
Ignored = Callable[..., dict[str, str]]  # the headers that name what is left out of a request
STATIC = Path(__file__).with_name("static")
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304 where the ETag is the same
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def create_app(
    scheduler: Scheduler,
    tok,
    info: dict,
    *,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    strict: bool = False,
) -> FastAPI:
    """The application over a scheduler that it starts and stops. `info`: run, stage and suggestions, for the page.

    strict: fields that are not known are refused, and not left out.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        scheduler.start()
        yield
        await run_in_threadpool(scheduler.stop)

    app = FastAPI(title="nanochat_jax", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(scheduler)
    errors.install(app)
    app.add_middleware(Edge, metrics=metrics, key=api_key)
    if cors_origins:  # outside of the key: a browser asks for permission without one
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED
        )
    _add_watching(app, scheduler, metrics, info)
    ignored = functools.partial(_ignored, metrics, strict)
    _add_api(app, scheduler, metrics, tok, f"{info['run']}/{info['stage']}", ignored)
    _add_tokens(app, scheduler, tok, ignored)
    _add_page(app)
    return app


def _documented(*statuses: int, **ok) -> dict:
    """OpenAPI's `responses`: a 200 as given, and errors."""
    return {200: ok} | {s: {"model": schemas.Error} for s in statuses}


def _add_watching(app: FastAPI, scheduler: Scheduler, metrics: Metrics, info: dict) -> None:
    @app.get("/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
    async def health():
        """Alive: the engine has not failed."""
        state = {"status": "ok" if scheduler.alive else "failed", **info}
        state |= {"slots": scheduler.engine.slots, **scheduler.counts()}
        return JSONResponse(state, 200 if scheduler.alive else 503)

    @app.get("/ready", responses={200: {"model": schemas.Ready}, 503: {"model": schemas.Error}})
    async def ready():
        """Requests are taken and worked on. compiled: none of the usual ones has to wait for a compilation."""
        if scheduler.ready:
            return JSONResponse({"status": "ready", "compiled": scheduler.compiled})
        raise ApiError(503, "the engine does not take requests")

    @app.get("/metrics", response_class=Response, responses=_documented(401, content={"text/plain": {}}))
    async def prometheus():
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _ignored(metrics: Metrics, strict: bool, body: schemas.Lenient, more: Sequence[str] = ()) -> dict[str, str]:
    """The header that names what is left out of a request, and `more`; it is counted. strict: ApiError."""
    if names := [*body.unknown(), *more]:
        if strict:
            raise ApiError(400, f"unknown field {names[0]}", names[0])
        metrics.ignored.inc(len(names))
    said = re.sub("[^ -~]", "?", ", ".join(names))
    return {"X-Ignored-Fields": said[:1000]} if names else {}


def _add_api(app: FastAPI, scheduler: Scheduler, metrics: Metrics, tok, model: str, ignored: Ignored) -> None:
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "nanochat_jax"}
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    streams = {"text/event-stream": {"schema": event}}
    vocabulary, kept = functools.cache(lambda: Vocabulary(tok)), Kept()

    async def grammar_of(body: schemas.Sampling) -> Grammar | None:
        if body.calls is None and body.schema_wanted is None:
            return None
        try:
            return await run_in_threadpool(tools.grammar_of, vocabulary(), body.calls, body.schema_wanted)
        except ValueError as e:
            raise ApiError(400, str(e), str(e).partition(":")[0]) from None

    async def begun(body: schemas.Conversing) -> tuple[Answer, dict, dict[str, str], list[str]]:
        """The answer to a conversation, what the reply says beside it where that had to be cut, the headers that name
        what is left out, and the functions that may be called."""
        context = scheduler.engine.max_len
        limit = dialogue.prompt_limit(scheduler.engine, body.limit)
        thinking, notes = body.thinking(context) if body.is_free else False, set[str]()

        def fits(functions: Sequence[Mapping]) -> bool:
            return len(tok.encode(system_text(functions, thinking))) <= limit // 2

        def prompt() -> tuple[dialogue.Fitted, list[Mapping], list[str]]:
            told, left_out = tools.fitting(body.functions, fits)
            fitted = dialogue.fit(tok, body.conversation(told, thinking, notes), limit)
            return fitted, told, left_out + [f"tools.{name}" for name in sorted(notes)]

        fitted, told, left_out = await _aside(body, prompt)
        names = [f["name"] for f in told] if body.calls is None else list(body.calls)
        machine = Tools(tok, names, thinking if thinking is not True else None) if names or thinking else None
        grammar: Grammar | Mixed | None = await grammar_of(body)
        if body.is_free and machine:
            grammar, loose = await run_in_threadpool(tools.free_grammar, vocabulary(), told, machine)
            left_out += loose
        headers, cut = ignored(body, left_out), {"dropped_messages": fitted.dropped, "truncated": fitted.truncated}
        answer = Answer(scheduler, tok, [fitted.ids], body, metrics, grammar, machine)
        return answer, {"context": cut} if any(cut.values()) else {}, headers, names

    @app.get("/v1/models", responses=_documented(401, model=schemas.ModelList))
    async def models():
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{id:path}", responses=_documented(401, 404, model=schemas.Model))
    async def one_model(id: str):
        if id != model:
            raise ApiError(404, f"there is no model {id!r}, only {model!r}", "id", "model_not_found")
        return JSONResponse(entry)

    @app.post("/v1/chat/completions", responses=_documented(*POSTED, model=schemas.ChatCompletion, content=streams))
    async def chat(body: ChatRequest, request: Request):
        answer, extra, headers, names = await begun(body)
        shape = ChatShape(tok, bool(body.logprobs), names)
        return await reply(answer, shape, request, body, model, headers, **extra)

    @app.post("/v1/completions", responses=_documented(*POSTED, model=schemas.TextCompletion, content=streams))
    async def completions(body: CompletionRequest, request: Request):
        headers = ignored(body)
        try:
            prompts = await _aside(body, body.prompts, tok)
        except ValueError as e:
            raise ApiError(400, str(e), "prompt") from None
        longest, room = max(map(len, prompts)), scheduler.engine.max_len
        if longest + (body.limit > 0) > room:
            message = f"the prompt is {longest} tokens long, and the context of {room} has to hold an answer too"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        echoed = await run_in_threadpool(echo, scheduler.engine, tok, prompts, body) if body.echo else []
        shape = TextShape(tok, body.logprobs is not None, echoed, body.n or 1)
        if body.is_scored:
            return scored(shape, prompts, body, model, headers)
        answer = Answer(scheduler, tok, prompts, body, metrics, await grammar_of(body))
        return await reply(answer, shape, request, body, model, headers)

    @app.post("/v1/responses", responses=_documented(*POSTED, model=schemas.Response, content=streams))
    async def responses(body: ResponsesRequest, request: Request):
        body.input = kept.resolved(body.input)
        answer, extra, headers, names = await begun(body)
        return await respond(answer, request, body, model, headers, kept, names, **extra)


def _add_tokens(app: FastAPI, scheduler: Scheduler, tok, ignored: Ignored) -> None:
    """What vLLM has beside OpenAI's API, by which evaluations learn about the tokenizer."""

    @app.post("/tokenize", responses=_documented(*POSTED, model=schemas.Tokens))
    async def tokenize(body: schemas.Tokenize):
        headers, ids = ignored(body), await run_in_threadpool(body.ids, tok)
        told = {"tokens": ids, "count": len(ids), "max_model_len": scheduler.engine.max_len}
        return JSONResponse(told, headers=headers)

    @app.post("/detokenize", responses=_documented(*POSTED, model=schemas.Detokenized))
    async def detokenize(body: schemas.Detokenize):
        headers, text = ignored(body), await run_in_threadpool(tok.decode, body.tokens)
        return JSONResponse({"prompt": text}, headers=headers)

    @app.get("/tokenizer_info", responses=_documented(401, model=schemas.TokenizerInfo))
    async def tokenizer_info():
        about = {f"{what}_token": "<|bos|>" for what in ("bos", "eos", "pad")}  # what stands between documents
        return JSONResponse({**about, "vocab_size": tok.vocab_size})


async def _aside(body: schemas.Sampling, do, *args):
    """do(*args), for a long text in a thread of its own: a short one takes less time than to change threads."""
    return await run_in_threadpool(do, *args) if body.chars() > SHORT_TEXT else do(*args)


def _add_page(app: FastAPI) -> None:
    files = Files(directory=STATIC)
    app.mount("/static", files)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request):
        return await files.get_response("index.html", request.scope)


class Files(StaticFiles):
    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
