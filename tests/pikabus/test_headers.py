"""What is written into the headers of PikaBus, and read from them."""

from __future__ import annotations

import pytest

from streamtools import Bus, ConfigurationError, Message
from streamtools.compat.pikabus import DIRECT, PikaBus
from streamtools.errors import QueueError
from streamtools.message import ErrorDetails

#: 2019-07-22 11:40:19.5 UTC
MOMENT = 1563795619.5
TEXT = "07/22/2019 11:40:19"


async def bound(queue: str) -> None:
    """There is such a queue, and it is bound now."""


STYLE = PikaBus("PikaBus", bound)
FULL = Message(
    body=b"{}",
    queue="orders",
    id="1",
    type="orders.Place",
    source="shop",
    time=MOMENT,
    content_type="application/json",
    correlation_id="c",
    reply_to="shop",
    intent="event",
    headers={"tenant": "acme"},
    deliver_at=MOMENT + 10,
    attempt=3,
    error=ErrorDetails(
        queue="orders", exception="ValueError", reason="no", traceback="T\nValueError: no", attempts=2
    ),
)
HEADERS = {
    "PikaBus.MessageId": "1",
    "PikaBus.CorrelationId": "c",
    "PikaBus.ReplyToAddress": "shop",
    "PikaBus.OriginatingAddress": "shop",
    "PikaBus.ContentType": "application/json",
    "PikaBus.ContentEncoding": "utf-8",
    "PikaBus.MessageType": "orders.Place",
    "PikaBus.Intent": "event",
    "PikaBus.TimeSent": TEXT,
    "PikaBus.ErrorDetails": "T\nValueError: no",
    "PikaBus.SourceQueue": "orders",
    "PikaBus.ErrorRetries": "2",
    "PikaBus.DeferredTime": "07/22/2019 11:40:29",
}


def test_all_thirteen_headers_are_written() -> None:
    written = dict(STYLE.write(FULL).headers)

    assert len(HEADERS) == 13
    assert {name: written.get(name) for name in HEADERS} == HEADERS
    assert set(written) - set(HEADERS) == {"tenant", "PikaBus.CountedRetries"}


def test_what_was_written_is_read_back_whole_and_writing_twice_is_writing_once() -> None:
    written = STYLE.write(FULL)

    assert STYLE.write(written) == written
    assert STYLE.read(written) == FULL.replace(content_encoding="utf-8")


def test_all_thirteen_headers_are_read() -> None:
    message = STYLE.read(Message(body=b"{}", queue="error", id="other", headers={**HEADERS, "tenant": "acme"}))

    assert message.headers == {"tenant": "acme"}
    assert (message.id, message.correlation_id, message.reply_to, message.source) == ("1", "c", "shop", "shop")
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert (message.type, message.intent, message.attempt) == ("orders.Place", "event", 3)
    assert message.time == MOMENT - 0.5
    assert message.deliver_at == MOMENT + 10.5  # never early: the second may have been any part of one
    assert message.error == ErrorDetails(
        queue="orders", exception="ValueError", reason="no", traceback="T\nValueError: no", attempts=2,
        first_failed=MOMENT - 0.5, last_failed=MOMENT - 0.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (TEXT, MOMENT + 0.5),
        ("2019-07-22T11:40:19.500000+00:00", MOMENT),
        ("2019-07-22T13:40:19.500000+02:00", MOMENT),
        ("2019-07-22T11:40:19.5Z", MOMENT),
        ("2019-07-22T11:40:19.5", MOMENT),
        ("tomorrow", None),
        ("", None),
    ],
)
def test_times_of_both_versions_are_read(text: str, seconds: float | None) -> None:
    message = Message(body=b"", queue="q", id="1", headers={"PikaBus.DeferredTime": text})

    assert STYLE.read(message).deliver_at == seconds


def test_a_message_without_these_headers_is_as_it_is() -> None:
    message = Message(body=b"", queue="q", id="1", headers={"PikaBus.Other": "x", "tenant": "acme"})

    assert STYLE.read(message) is message


def test_the_prefix_is_anyones() -> None:
    style = PikaBus("Acme.Bus", bound)
    written = style.write(FULL)

    assert written.headers["Acme.Bus.MessageId"] == "1"
    assert not any(name.startswith("PikaBus") for name in written.headers)
    assert style.read(written).headers == {"tenant": "acme"}
    assert STYLE.read(written) is written


@pytest.mark.parametrize("prefix", ["", "streamtools-x", "ä", "a\n"])
def test_a_prefix_that_cannot_be_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="header_prefix"):
        Bus("q", url="asyncio://", header_style="pikabus", header_prefix=prefix)


@pytest.mark.parametrize("ack", ["on_receive", "manual"])
def test_what_could_not_wait_for_its_deferred_time_is_refused(ack: str) -> None:
    with pytest.raises(ConfigurationError, match="ack='after'"):
        Bus("q", url="asyncio://", header_style="pikabus", ack=ack)


def test_a_style_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="pikabus"):
        Bus("q", url="asyncio://", header_style="nservicebus")  # type: ignore[arg-type]


def test_a_header_that_the_user_gave_stays() -> None:
    message = FULL.replace(headers={"PikaBus.ReplyToAddress": "elsewhere"})

    assert STYLE.write(message).headers["PikaBus.ReplyToAddress"] == "elsewhere"


def test_a_request_is_named_by_its_correlation_id() -> None:
    # All that a reply of PikaBus says of what it answers.
    request = FULL.replace(intent="request")

    written = STYLE.write(request)
    assert (written.headers["PikaBus.CorrelationId"], written.headers["PikaBus.Intent"]) == ("1", "command")
    assert written.correlation_id == "c"
    assert STYLE.read(written).correlation_id == "c"


# --- who failed how often ---------------------------------------------------------------------------


def failed_at_pikabus(message: Message, retries: int) -> Message:
    """As PikaBus sends it anew: all headers kept, one more counted."""
    headers = {**message.headers, "PikaBus.ErrorRetries": str(retries), "PikaBus.SourceQueue": "legacy"}
    return message.replace(headers=headers)


def test_failures_of_pikabus_count_on_top_of_ours() -> None:
    ours = STYLE.write(FULL)

    message = STYLE.read(failed_at_pikabus(ours, 4))
    assert message.attempt == 5
    assert message.error is not None and (message.error.queue, message.error.attempts) == ("legacy", 4)


def test_a_message_that_an_operator_put_back_begins_anew() -> None:
    failed = STYLE.write(FULL.replace(error=FULL.error))

    # The admin knows nothing of these headers, so they stay.
    put_back = failed.replace(attempt=1, error=None)
    assert (STYLE.read(put_back).attempt, STYLE.read(put_back).error) == (1, None)
    assert STYLE.read(failed_at_pikabus(put_back, 3)).attempt == 2


@pytest.mark.parametrize("number", ["", "-1", "many", "1.5", "9" * 400, "٣"])
def test_a_number_that_is_none_is_read_over(number: str) -> None:
    message = Message(body=b"", queue="q", id="1", headers={"PikaBus.ErrorRetries": number})

    assert STYLE.read(message).attempt == 1


# --- binding ----------------------------------------------------------------------------------------


async def test_a_destination_is_bound_once_and_one_that_is_missing_again_and_again() -> None:
    asked: list[str] = []

    async def bind(queue: str) -> None:
        asked.append(queue)
        if queue == "missing":
            raise QueueError("There is no queue.")

    style = PikaBus("PikaBus", bind)
    there, missing = FULL.replace(exchange=DIRECT), FULL.replace(exchange=DIRECT, queue="missing")
    for _ in range(2):
        written = await style.write_all([there, missing, FULL])
        # What cannot be bound is sent to as itself.
        assert [message.exchange for message in written] == [DIRECT, None, None]
    assert asked == ["orders", "missing", "missing"]
