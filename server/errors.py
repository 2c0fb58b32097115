"""Every error as OpenAI says it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import http
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_jax.errors import UserError
from server.scheduler import Busy, Stopped

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that cannot be answered: status 400, and which parameter is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def detail(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """The object; what a client sent may be named in it, and need not be valid Unicode."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message, blamed = (s and s.encode(errors="replace").decode() for s in (message, param or ""))
    return {"error": {"message": message, "type": kind, "param": blamed or None, "code": code}}


def response(
    status: int, message: str, param=None, code=None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(detail(status, message, param, code), status, headers)


def install(app: FastAPI) -> None:
    """Gives the application a handler for each kind of error."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError):
        # Where a union fails, a member of the right type says more than that others are of another.
        return response(400, *_described(min(e.errors(), key=lambda error: error["type"].endswith("_type"))))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, e: HTTPException):
        message = e.detail
        if e.status_code in (404, 405):
            message = f"{http.HTTPStatus(e.status_code).phrase}: {request.method} {request.url.path}"
        return response(e.status_code, message, headers=e.headers)

    @app.exception_handler(UserError)
    async def no_conversation(request: Request, e: UserError):
        return response(400, str(e), "messages")

    @app.exception_handler(Refused)
    async def refused(request: Request, e: Refused):
        return response(400, str(e), e.param, e.code)

    @app.exception_handler(Busy)
    async def busy(request: Request, e: Busy):
        message = f"too many requests are waiting; try again in {e.retry_after} s"
        return response(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(e.retry_after)})

    @app.exception_handler(Stopped)
    async def stopped(request: Request, e: Stopped):
        return response(500, f"the engine is down: {e}", code="engine_down")

    @app.exception_handler(Exception)
    async def failed(request: Request, e: Exception):
        return response(500, "the server failed; its log says why")


def _described(error: dict) -> tuple[str, str | None]:
    """(message, parameter) of one of pydantic's errors."""
    first, *rest = error["loc"][1:] or ("the body",)
    place = ".".join(str(part) for part in (first, *rest) if part == first or not _is_tag(part))
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']}", None
    if error["type"] == "extra_forbidden":
        return f"unknown field {place}", place
    if error["type"] == "value_error" and len(error["loc"]) == 1:
        return error["msg"].removeprefix("Value error, "), None
    return f"{place}: {error['msg'].removeprefix('Value error, ')}", place if first != "the body" else None


def _is_tag(part: str | int) -> bool:
    """A part of a place that pydantic adds for the member of a union that it tried."""
    return isinstance(part, str) and ("[" in part or part in ("str", "system", "developer", "user", "assistant"))
