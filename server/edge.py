"""What holds for every request, whatever its route: the key, the size of the body, headers, and being counted."""

import asyncio
import hmac
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.metrics import Metrics

MAX_BODY = 1_000_000  # bytes
BODY_SECONDS = 20.0  # a body that takes longer is given up
CLOSE = {"Connection": "close"}  # with a refusal, as the rest of the body is not read
SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Edge:
    """ASGI middleware. key: what /v1 and /metrics want as a bearer token; None: nothing."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None):
        self._app, self._metrics, self._key = app, metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
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
        if not self._key or not scope["path"].startswith("/v1/") and scope["path"] != "/metrics":
            return True
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())


def bounded(receive: Receive, headers: Headers) -> Receive:
    """`receive` that raises 413 where a body is, or says it is, too large and 408 where it comes too slowly."""
    size, whole = 0, False
    announced = headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", headers=CLOSE)
    end = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_in_time() -> Message:
        nonlocal size, whole
        if announced.isdecimal() and int(announced) > MAX_BODY:
            raise too_large
        try:
            async with asyncio.timeout_at(None if whole else end):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s", headers=CLOSE) from None
        size, whole = size + len(message.get("body", b"")), not message.get("more_body")
        if size > MAX_BODY:
            raise too_large
        return message

    return receive_in_time
