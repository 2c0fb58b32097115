"""The HTTP side: OpenAI's chat completions, streamed or whole, health, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from nanochat_jax import dialogue, engine
from nanochat_jax.errors import UserError
from server.scheduler import Busy, Job, Scheduler, Stopped, Update
from server.schemas import ChatRequest

PAGE = Path(__file__).with_name("page.html")
LOOK_EVERY = 0.5  # seconds between looks whether a client that waits for a whole answer is still there


def create_app(scheduler: Scheduler, tok, info: dict) -> FastAPI:
    """The application over a scheduler that it starts and stops. `info`: {"run", "stage"}, for the page."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        scheduler.start()
        yield
        await run_in_threadpool(scheduler.stop)

    app = FastAPI(title="nanochat_jax", lifespan=lifespan)
    model = f"{info['run']}/{info['stage']}"

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError):
        first = e.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(422, f"{place}: {first['msg']}" if place else first["msg"])

    @app.exception_handler(UserError)
    async def refused(request: Request, e: UserError):
        return _error(400, str(e))

    @app.get("/")
    async def page():
        return FileResponse(PAGE, media_type="text/html", headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    async def health():
        state = {"status": "ok" if scheduler.alive else "failed", **info}
        state |= {"slots": scheduler.engine.slots, **scheduler.counts()}
        return JSONResponse(state, 200 if scheduler.alive else 503)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "nanochat_jax"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        prompt = await run_in_threadpool(_engine_request, scheduler, tok, body)
        try:
            answer = Answer(scheduler, tok, prompt)
        except Busy:
            return _error(503, "too many requests are waiting; try again in a moment", {"Retry-After": "2"})
        except Stopped as e:
            return _error(500, f"the engine is down: {e}")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if body.stream:
            return StreamingResponse(_stream(answer, head), media_type="text/event-stream", headers=_NO_BUFFER)
        return await _whole(answer, head, request)

    return app


_NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _error(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, headers)


def _engine_request(scheduler: Scheduler, tok, body: ChatRequest) -> engine.Request:
    """The prompt, fitted into the context. UserError where the messages are no conversation."""
    limit = dialogue.prompt_limit(scheduler.engine, body.max_tokens)
    return engine.Request(
        dialogue.fit(tok, [m.model_dump() for m in body.messages], limit),
        body.max_tokens,
        body.temperature,
        body.top_k,
        body.top_p,
        random.randrange(2**31) if body.seed is None else body.seed,
        (tok.assistant_end, tok.bos),
    )


class Answer:
    """One request on its way: updates come from the engine thread into an asyncio queue."""

    def __init__(self, scheduler: Scheduler, tok, request: engine.Request):
        self.request, self._scheduler, self._pieces = request, scheduler, dialogue.Pieces(tok)
        loop, self._updates = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._updates.put_nowait, update)

        self.completion: engine.Completion | None = None
        self._job: Job = scheduler.submit(request, deliver)

    async def pieces(self) -> AsyncIterator[tuple[str, str]]:
        """(kind, text) as they are made. Stopped where the engine fails. Leaving early cancels the request."""
        try:
            while self.completion is None:
                update = await self._updates.get()
                if update.error is not None:
                    raise update.error
                for piece in self._pieces.push(update.ids):
                    yield piece
                self.completion = update.completion
            for piece in self._pieces.flush():
                yield piece
        finally:
            if self.completion is None:
                self._scheduler.cancel(self._job)

    def usage(self) -> dict:
        prompt, made = len(self.request.ids), len(self.completion.ids)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _event(value) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


async def _stream(answer: Answer, head: dict) -> AsyncIterator[str]:
    """Server-sent events: chat.completion.chunk objects, then [DONE]. A tool's part comes as delta.tool."""

    def chunk(delta: dict, reason: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    async with contextlib.aclosing(answer.pieces()) as pieces:
        try:
            async for kind, text in pieces:
                yield chunk({"content": text} if kind == "text" else {"tool": {"type": kind, "text": text}})
        except Stopped as e:
            yield _event({"error": {"message": f"the engine is down: {e}"}})
        else:
            yield chunk({}, answer.completion.finish_reason, usage=answer.usage())
    yield _event("[DONE]")


async def _whole(answer: Answer, head: dict, request: Request) -> JSONResponse:
    """The answer in one object; given up where the client has gone."""

    async def collect() -> str:
        async with contextlib.aclosing(answer.pieces()) as pieces:
            return "".join([text async for kind, text in pieces if kind == "text"])

    task = asyncio.ensure_future(collect())
    try:
        while not (await asyncio.wait([task], timeout=LOOK_EVERY))[0]:
            if await request.is_disconnected():
                return _error(499, "the client has gone")
        text = task.result()
    except Stopped as e:
        return _error(500, f"the engine is down: {e}")
    finally:
        task.cancel()
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": answer.completion.finish_reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage()})
