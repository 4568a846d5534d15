"""From exceptions to HTTP; the only place that maps them. Bodies have OpenAI's form.

UsageError, DataError      400    what was asked for cannot be
CheckpointError            500    something on the server is broken
EngineError                500    it failed while computing
Refusal                    as it says: 401 404 408 413 415 429 431 503 504 ...
anything else              500    a fault of ours, logged; the client reads no details
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from r2r_glimp.core import CheckpointError, DataError, EngineError, R2RGlimpError, UsageError
from r2r_glimp.serve.protocol import describe_problems

log = logging.getLogger("r2r_glimp.serve")

STATUS: dict[type[R2RGlimpError], int] = {
    UsageError: 400,
    DataError: 400,
    CheckpointError: 500,
    EngineError: 500,
}
# Statuses that the framework gives, in words that say what to do.
_UNSAID = {
    400: "the body cannot be read: it must be JSON in UTF-8, nested less than a thousand deep",
    404: "there is no such path: /openapi.json lists them",
    405: "this path does not take this method",
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(R2RGlimpError):
    """A request that the server does not take, or does not finish.

    Args:
        status: HTTP status.
        message: one line.
        code: OpenAI's short name of the reason.
        param: the field at fault.
        retry_after: seconds after which to try again, for refusals that pass.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def to_refusal(error: BaseException) -> Refusal:
    """Any exception as the refusal that answers it; what is unexpected is logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        message, param = describe_problems(list(error.errors()))
        return Refusal(400, message, param=param)
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return Refusal(status, str(error))
    log.error("unexpected: %r", error, exc_info=error)
    return Refusal(500, f"internal error: {type(error).__name__}; the server's log says more")


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's error object."""
    fallback = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": " ".join(str(refusal).split()),
            "type": _TYPES.get(refusal.status, fallback),
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that ended in an exception."""
    refusal = to_refusal(error)
    headers = refusal.headers
    if refusal.status == 500:
        headers["x-should-retry"] = "false"  # OpenAI's client would ask twice more for the same
    return JSONResponse(error_body(refusal), refusal.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the app's routes in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            said = _UNSAID.get(error.status_code, str(error.detail))
            where = f"{request.method:.20} {request.url.path!r:.100}"
            error = HTTPException(error.status_code, f"{said} ({where})", error.headers)
        response = error_response(error)
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    for kind in (R2RGlimpError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
