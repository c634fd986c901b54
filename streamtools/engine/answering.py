"""Answers of routed handlers: sends what a handler returns to the reply-to address of its message."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from streamtools import codec
from streamtools.engine.outbox import Outbox
from streamtools.engine.replies import ReplyRule
from streamtools.message import Message

log: logging.Logger = logging.getLogger("streamtools")


def is_request(message: Message, result: Any) -> bool:
    """Whether a handler's result must be sent to the sender of the message.

    A bus marks its requests by their intent, and waits for the answer even if it is None. Other programs set no
    intent: their message is a request if it has a reply-to address, and a result of None does not answer it.
    """
    if message.reply_to is None:
        return False
    return message.intent == "request" or (message.intent is None and result is not None)


class RouteAnswers:
    """Puts the result of a routed handler into its outbox if the message is a request.

    The sender of the message chose the address of the answer. If the address is wrong, the handler does not fail.

    Parameters:
        place: the place of the consumer, which sends the answer with its acknowledgement.
        rule: decides whether the address may get an answer.
        source: the `source` of the answer.
    """

    def __init__(self, place: object, rule: ReplyRule, source: str | None) -> None:
        self.place = place
        self._rule = rule
        self._source = source

    def __call__(self, box: Outbox, message: Message, result: Any) -> None:
        """Put the answer into the outbox, or log why that is not possible."""
        if box.replied or not is_request(message, result) or not self._rule.allows(message):
            return
        try:
            box.add(self, self._reply(box, message, result))
        except TypeError as error:
            log.warning("Message %s of %r is not answered: %s", message.id, message.queue, error)

    def _reply(self, box: Outbox, message: Message, result: Any) -> Message:
        target = message.reply_to or ""
        body, content_type = codec.encode(result)
        return Message(
            body=body,
            queue=target,
            id=box.id(target) or message.id,
            mandatory=False,  # perhaps nobody waits for the answer any more
            source=self._source,
            time=time.time(),
            content_type=content_type,
            correlation_id=message.correlation_id or message.id,
            causation_id=message.id,
            intent="reply",
        )

    async def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages unchanged."""
        return messages

    async def send_now(self, messages: Sequence[Message]) -> None:
        """Log that the answer is not sent: only an acknowledgement carries it, and the handler settled by itself."""
        log.warning("The answer to message %s is not sent: it was settled by hand.", messages[0].causation_id)
