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
    """Whether a handler's result is to be sent to the requester.

    A bus marks its requests, and waits for an answer of None as well. Other programs give no intent: their
    message with a reply-to is a request, and only a value answers it.
    """
    if message.reply_to is None:
        return False
    return message.intent == "request" or (message.intent is None and result is not None)


class RouteAnswers:
    """Puts the result of a routed handler into its outbox if the message is a request.

    The sender of the message chose the address. A wrong one does not fail the handler.

    Parameters:
        place: the consumer's: it sends the answer with its acknowledgement.
        rule: decides whether the address may get an answer.
        source: who answers.
    """

    def __init__(self, place: object, rule: ReplyRule, source: str | None) -> None:
        self.place = place
        self._rule = rule
        self._source = source

    def __call__(self, box: Outbox, message: Message, result: Any) -> None:
        """Answer, or log why that is not possible."""
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
            mandatory=False,  # nobody may be waiting any more
            source=self._source,
            time=time.time(),
            content_type=content_type,
            correlation_id=message.correlation_id or message.id,
            causation_id=message.id,
            intent="reply",
        )

    async def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, unchanged."""
        return messages

    async def send_now(self, messages: Sequence[Message]) -> None:
        """Not sent: only an acknowledgement carries an answer, and the handler has settled the message itself."""
        log.warning("The answer to message %s is not sent: it was settled by hand.", messages[0].causation_id)
