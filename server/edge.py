"""What holds for every request, whatever its route: the key, the size of the body, headers, and being counted."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.datastructures import Headers, MutableHeaders

from server import errors
from server.metrics import Metrics

MAX_BODY = 1_000_000  # bytes
BODY_SECONDS = 20.0  # a body that takes longer is given up
SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Edge:
    """ASGI middleware. key: what /v1 and /metrics want as a bearer token; None: nothing."""

    def __init__(self, app, metrics: Metrics, key: str | None):
        self._app, self._metrics, self._key = app, metrics, key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, began = 500, time.perf_counter()

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._checked(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(route, status).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - began)

    async def _checked(self, scope, receive, send) -> None:
        headers = Headers(scope=scope)
        if self._key and not self._allowed(scope["path"], headers):
            refusal = errors.response(
                401, "needs this server's API key as a bearer token", code="invalid_api_key", headers=_BEARER
            )
            return await refusal(scope, receive, send)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        body = await _body(headers, receive)
        if isinstance(body, bytes):
            return await self._app(scope, _again(body, receive), send)
        if body is not None:
            await errors.response(*body, headers={"Connection": "close"})(scope, receive, send)

    def _allowed(self, path: str, headers: Headers) -> bool:
        if not path.startswith("/v1/") and path != "/metrics":
            return True
        given = headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())


_BEARER = {"WWW-Authenticate": "Bearer"}


async def _body(headers: Headers, receive) -> bytes | tuple[int, str] | None:
    """A request's body; or the status and message of a refusal; None where the client has gone."""
    length = headers.get("content-length", "")
    parts, size, too_large = [], 0, (413, f"the body is larger than {MAX_BODY} bytes")
    if length.isdecimal() and int(length) > MAX_BODY:
        return too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY:
                    return too_large
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        return 408, f"the body did not come within {BODY_SECONDS:g} s"


def _again(body: bytes, receive):
    """A `receive` that gives the body that has been read, then what really comes."""
    given = False

    async def replay():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
