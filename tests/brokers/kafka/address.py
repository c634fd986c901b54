"""Where a Kafka is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tests.brokers.address import Address

#: Who may log in at the SASL listeners, by PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512. The password has what a URL
#: must escape.
USERNAME, PASSWORD = "tester", "p@ss/w:%"


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaAddress(Address):
    """A Kafka to test against; each URL is `kafka://host:port,host:port/`, without a user in it."""

    broker: ClassVar[str] = "kafka"

    #: Listeners that want `username` and `password`; the second one encrypts, too.
    sasl_url: str | None = None
    sasl_tls_url: str | None = None
    username: str | None = None
    password: str | None = None
    #: "yes" for the mock cluster inside librdkafka, which does not do everything faithfully.
    mock: str | None = None

    @property
    def bootstrap(self) -> str:
        """`host:port,host:port`, as Kafka's clients take it."""
        return hosts(self.url)


def hosts(url: str) -> str:
    """The `host:port,host:port` of a URL."""
    return url.partition("://")[2].rstrip("/")
