"""Failures that a caller of the server is told about, each with its HTTP status. Every part of serving raises them."""

from __future__ import annotations

from collections.abc import Mapping

from raytower.errors import RaytowerError


class ApiError(RaytowerError):
    """A failure that the caller is told about, with its HTTP status. The message is safe to show."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.headers = dict(headers or {})


class BadRequestError(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_json"


class UnauthorisedError(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class ForbiddenError(ApiError):
    status, type, code = 403, "permission_error", "forbidden"


class NotConfiguredError(ApiError):
    status, type, code = 404, "invalid_request_error", "not_configured"


class NotFoundError(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class MethodError(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class ConflictError(ApiError):
    status, type, code = 409, "invalid_request_error", "not_changed"


class SlowBodyError(ApiError):
    status, type, code = 408, "invalid_request_error", "body_too_slow"


class TooLargeError(ApiError):
    status, type, code = 413, "invalid_request_error", "too_large"


class UnsupportedError(ApiError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class WrongHostError(ApiError):
    status, type, code = 421, "invalid_request_error", "wrong_host"


class UnprocessableError(ApiError):
    status, type, code = 422, "invalid_request_error", "invalid_value"


class OverloadedError(ApiError):
    status, type, code = 429, "rate_limit_error", "overloaded"


class NotFiniteError(ApiError):
    """A model gave a value that is not a number: the server's fault, and never sent as null."""

    status, type, code = 500, "server_error", "not_finite"


class NotReadyError(ApiError):
    status, type, code = 503, "server_error", "not_ready"


class OutOfTimeError(ApiError):
    status, type, code = 504, "timeout_error", "out_of_time"
