"""What holds for every request, whatever its route: the key, the body, headers, old clients, and being counted."""

import asyncio
import hmac
import time
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.metrics import Metrics

MAX_BODY = 1_000_000  # bytes
BODY_SECONDS = 20.0  # a body that takes longer is given up
CLOSE = {"Connection": "close"}  # with a refusal, as the rest of the body is not read
LOCKED = ("/metrics", "/tokenize", "/detokenize", "/tokenizer_info")  # beside all of /v1
SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Edge:
    """ASGI middleware. key: what /v1 and LOCKED want as a bearer token; None: nothing."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None):
        self._app, self._metrics, self._key = app, metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope = as_meant(scope)
        send = send if scope["http_version"] != "1.0" else whole(send)
        status, began = 500, time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                if self._allowed(scope):
                    await self._app(scope, bounded(receive, Headers(scope=scope)), counted)
                else:
                    message, asks = "needs this server's API key as a bearer token", {"WWW-Authenticate": "Bearer"}
                    refusal = ApiError(401, message, code="invalid_api_key", headers=asks).response()
                    await refusal(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - began)

    def _allowed(self, scope: Scope) -> bool:
        if not self._key or not scope["path"].startswith("/v1/") and scope["path"] not in LOCKED:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode())


def as_meant(scope: Scope) -> Scope:
    """A body that is posted is JSON, whatever its header says; a slash at the end of a path says nothing; HEAD is
    GET, whose body the server leaves out."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    path = scope["path"].rstrip("/") if len(scope["path"]) > 1 else scope["path"]
    posted = scope["method"] == "POST"
    return {
        **scope,
        "path": path or "/",
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        "headers": [*headers, (b"content-type", b"application/json")] if posted else scope["headers"],
    }


def whole(send: Send) -> Send:
    """`send` for a client of HTTP/1.0, which knows no chunks: a stream comes to it in one piece."""
    start: Message = {}
    body = bytearray()

    async def send_at_the_end(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = {**message}
            return
        body.extend(message.get("body", b""))
        if not message.get("more_body"):
            MutableHeaders(scope=start)["content-length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": bytes(body)})

    return send_at_the_end


def bounded(receive: Receive, headers: Headers) -> Receive:
    """`receive` of a body, unzipped where it is gzip. Raises 413 where it is too large, or says so, and 408 where it
    comes too slowly."""
    size, ended = 0, False
    zipped = zlib.decompressobj(31) if headers.get("content-encoding", "").lower() == "gzip" else None
    announced = headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", headers=CLOSE)
    end = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_in_time() -> Message:
        nonlocal size, ended
        if announced.isdecimal() and int(announced) > MAX_BODY:
            raise too_large
        try:
            async with asyncio.timeout_at(None if ended else end):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s", headers=CLOSE) from None
        if zipped and message.get("body"):
            try:
                message = {**message, "body": zipped.decompress(message["body"], MAX_BODY + 1)}
            except zlib.error:
                raise ApiError(400, "the body is not gzip, as its Content-Encoding says", headers=CLOSE) from None
        size, ended = size + len(message.get("body", b"")), not message.get("more_body")
        if size > MAX_BODY:
            raise too_large
        return message

    return receive_in_time
