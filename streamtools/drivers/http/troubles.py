"""What passes, so that a message is sent again until `send_timeout` is over, and what is for good.

| | |
|---|---|
| connection refused or reset, no connection in time, a name that is not found | passes |
| the certificate is wrong, or the other side speaks no TLS | for good |
| the answer is not HTTP, or does not come within `timeout` | for good: it may have been handled |
| the statuses of `PASSING`; 429 and any 5xx that say when to come again (`Retry-After`) | passes |
| every other status but 2xx | for good |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Statuses after which a message is sent again, and what they say.
PASSING: Final = {
    408: "the request did not arrive in time",
    425: "too early",
    502: "a proxy could not reach the service",
    503: "not now",
    504: "a proxy had no answer in time",
}


def passes(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the same request may be answered otherwise later."""
    return status in PASSING or ((status == 429 or 500 <= status < 600) and "Retry-After" in headers)
