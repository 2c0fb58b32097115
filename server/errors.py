"""Every error as OpenAI says it: {"error": {"message", "type", "param", "code"}}."""

import http

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_jax.chats import Unusable
from nanochat_jax.errors import UserError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """What is answered with an error. param: the parameter that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict:
        """What a client sent may be named in it, and need not be valid Unicode."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        message, param = (s and s.encode(errors="replace").decode() for s in (self.detail, self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


class Busy(ApiError):
    """More requests wait than may. retry_after: seconds until there should be a free slot."""

    def __init__(self, retry_after: int):
        message = f"too many requests are waiting; try again in {retry_after} s"
        super().__init__(429, message, None, "rate_limit_exceeded", {"Retry-After": str(retry_after)})


class Stopped(ApiError):
    """The engine thread has ended: the server stops, or the engine failed."""

    def __init__(self, why: object):
        super().__init__(500, f"the engine is down: {why}", code="engine_down")


def install(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, e: HTTPException):
        if isinstance(e, ApiError):
            return e.response()
        message = e.detail
        if e.status_code in (404, 405):
            message = f"{http.HTTPStatus(e.status_code).phrase}: {request.method} {request.url.path}"
        return ApiError(e.status_code, message, headers=e.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError):
        # Where a union fails, a member of the right type says more than that others are of another.
        return _described(min(e.errors(), key=lambda error: error["type"].endswith("_type"))).response()

    @app.exception_handler(UserError)
    @app.exception_handler(Unusable)
    async def no_conversation(request: Request, e: Exception):
        return ApiError(400, f"messages: {e}", "messages").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, e: Exception):
        return ApiError(500, "the server failed; its log says why").response()


def _described(error: dict) -> ApiError:
    first, *rest = error["loc"][1:] or ("the body",)
    place = ".".join(str(part) for part in (first, *rest) if part == first or not _is_tag(part))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']}")
    if error["type"] == "value_error" and len(error["loc"]) == 1:
        return ApiError(400, message)
    return ApiError(400, f"{place}: {message}", place if first != "the body" else None)


def _is_tag(part: str | int) -> bool:
    """A part of a place that pydantic adds for the member of a union that it tried."""
    return isinstance(part, str) and ("[" in part or part in ("str", "system", "developer", "user", "assistant"))
