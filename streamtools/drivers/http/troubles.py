"""Decides which failures are temporary: then a message is sent again until `send_timeout` is over.

| failure | kind |
|---|---|
| connection refused or reset, no connection in time, a host name that is not found | temporary |
| the certificate is wrong, or the other side does not speak TLS | permanent |
| the answer is not HTTP, or does not come within `timeout` | permanent: the message may have been handled |
| a status of `PASSING`; 429 or any 5xx with `Retry-After` | temporary |
| every other status except 2xx | permanent |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Temporary statuses, after which a message is sent again, and their meanings.
PASSING: Final = {
    408: "the request did not arrive in time",
    425: "too early",
    502: "a proxy could not reach the service",
    503: "not now",
    504: "a proxy had no answer in time",
}


def passes(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a status is temporary, so that the request should be sent again."""
    return status in PASSING or ((status == 429 or 500 <= status < 600) and "Retry-After" in headers)
