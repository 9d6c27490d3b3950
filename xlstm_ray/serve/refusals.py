"""What is refused over HTTP, in the form that OpenAI's clients read."""

import re
from collections.abc import Mapping

from fastapi.responses import JSONResponse

from xlstm_ray.errors import FIELD, OutputError, ReplicaLost, StateError, UsageError, XlstmRayError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    507: "server_error",
}
LOST_S = 1  # a lost replica's requests may be sent again after so many seconds
_CALLERS = UsageError, StateError  # what a caller can mend
_PATH = re.compile(r"^/.*?: |(?<![\w./])/[^\s:;,()]+")


class Refused(Exception):
    """A request that is not served. param: the field it is about. retry_s: seconds until it may be tried again.

    headers: more of the reply's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: XlstmRayError, names: Mapping[str, str] | None = None) -> "Refused":
        """An error of the library. names: how the caller calls a field that has another name there."""
        if isinstance(error, ReplicaLost):
            return cls(503, str(error), code="replica_lost", retry_s=LOST_S)
        text = FIELD.sub(lambda field: f"`{(names or {}).get(field[1], field[1])}`" + _value(field), str(error))
        field = FIELD.search(text)
        if isinstance(error, _CALLERS):
            return cls(400, text, param=field[1] if field else None)
        return cls(507 if isinstance(error, OutputError) else 500, without_paths(text))

    def body(self) -> dict[str, object]:
        """The error as a reply's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = self.headers | ({} if self.retry_s is None else {"retry-after": str(self.retry_s)})
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def without_paths(text: str) -> str:
    """An error of the service itself, as a caller is told it: where its files lie is the operator's business."""
    return _PATH.sub(lambda found: "" if found[0].endswith(": ") else "...", text)


def _value(field: re.Match[str]) -> str:
    return f" {field[2]}" if field[2] else ""
