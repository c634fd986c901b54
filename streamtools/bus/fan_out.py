"""HandlerFanOut: gives a delivery to all handlers of its type, each with its own verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamtools.bus.handler_registry import HandlerRegistry, of_class
from streamtools.bus.message_factory import MessageFactory
from streamtools.bus.requests import FAILURE, Failure
from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.engine.answering import is_request
from streamtools.engine.dispatch import Dispatcher, chain
from streamtools.engine.functions.invoke import Resolver, compile_handler
from streamtools.engine.messages.envelope import event_type
from streamtools.engine.messages.failures import describe
from streamtools.engine.outbox import Outbox, Sender
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import Reject, SendError, suggest
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.types import ErrorHandler, Handler, Middleware
from streamtools.verdicts import ACK, RELEASE, Copy, Verdict

log: logging.Logger = logging.getLogger("streamtools")


@dataclass(slots=True)
class Shared(Settlement):
    """One settlement for several handlers of a message.

    Attributes:
        parts: each handler's dispatcher and settlement.
    """

    parts: list[tuple[Dispatcher, Settlement]] = field(default_factory=list)


class HandlerFanOut:
    """Turns a delivery into a settlement, by the handlers of its type.

    Each handler has its own verdict. A retry is a copy for the handler that failed, so the handlers that succeeded do
    not run again.

    Parameters:
        handlers: the handlers of the bus.
        factory: makes replies.
        consumer: receives the messages of the bus's queue.
        incoming: middleware around every handler, outermost first.
        on_error: decides about failures; None to let each handler's `retry` decide.
        resolvers: what further parameters of handlers may be annotated with.
        threads: where `def` handlers run.
        sender: the bus, which sends the replies.
        holds: a message that arrives before its time is sent again with a delay, as senders of PikaBus expect it.
        failure_texts: the reply to a failed request has the text of the error, not only its class.
    """

    def __init__(
        self,
        handlers: HandlerRegistry,
        factory: MessageFactory,
        consumer: Consumer,
        *,
        incoming: Sequence[Middleware],
        on_error: ErrorHandler | None,
        resolvers: Mapping[type, Resolver],
        threads: Threads,
        sender: Sender,
        holds: bool,
        failure_texts: bool,
    ) -> None:
        self._failure_texts = failure_texts
        self._sender = sender
        self._handlers = handlers
        self._factory = factory
        #: What a handler sends leaves with the acknowledgement of its message.
        self._together = consumer.ack == "after"
        #: The answer to a request is the response of its call, and not a message (HTTP).
        self._by_call: bool = consumer.features.reply
        self._holds = holds and self._together and consumer.features.delay
        answer = None if self._by_call else self._answer

        def make(handler: Handler, name: str, retry: Retry | None = None) -> Dispatcher:
            handler = chain(handler, incoming)
            return consumer.make_dispatcher(handler, name, retry=retry, on_error=on_error, answer=answer)

        self._dispatchers: dict[str | None, list[Dispatcher]] = {}
        for entry in handlers:
            function = entry.function
            if isinstance(function, type):
                function = of_class(function, handlers.provided)
            compiled = compile_handler(function, threads, resolvers, entry.payload)
            self._dispatchers.setdefault(entry.type, []).append(make(compiled, entry.name, entry.retry))
        self._unknown = make(self._reject_unknown, "The bus")

    def stop(self) -> None:
        """Let retries that wait in place be given back at once."""
        for dispatchers in (*self._dispatchers.values(), [self._unknown]):
            for dispatcher in dispatchers:
                dispatcher.stop()

    async def __call__(self, delivery: Delivery) -> Settlement:
        due = delivery.message.deliver_at
        if self._holds and due is not None and due > time.time():
            return Settlement(delivery, ACK, (delivery.message,))  # sent again, so that the broker delays it
        dispatchers = self._find(delivery.message)
        if len(dispatchers) == 1:
            settlement = await dispatchers[0](delivery)
            await self._answer_failure(settlement)
            return settlement
        parts = []
        over = False
        for dispatcher in dispatchers:
            # After a handler that was cut short, the others are not begun: the consumer stops.
            part = Settlement(delivery, RELEASE) if over else await dispatcher(delivery)
            if part.verdict.kind.gives_back:
                over, part.outgoing = True, (delivery.message,)
            parts.append((dispatcher, _addressed(part, dispatcher.name)))
        return _merged(delivery, parts)

    def settlement(
        self, delivery: Delivery, message: Message, verdict: Verdict, error: BaseException | None
    ) -> Settlement:
        """The verdict with the copies that it needs."""
        return self._find(message)[0].settlement(delivery, message, verdict, error)

    def fallbacks(self, settlement: Settlement, error: BaseException) -> Iterator[Settlement]:
        """Ever smaller forms of a settlement that cannot be performed as it is."""
        return self._find(settlement.delivery.message)[0].fallbacks(settlement, error)

    async def refused(self, settlement: Settlement, error: SendError) -> Settlement:
        """What to do with a settlement whose outgoing messages the broker refuses; see `Dispatcher.refused`."""
        delivery = settlement.delivery
        if not isinstance(settlement, Shared):
            return await self._refused(self._find(delivery.message)[0], settlement, error)
        parts = []
        for dispatcher, part in settlement.parts:
            now = await self._refused(dispatcher, part, error)
            now = dispatcher.without_held(part, error) if now is part else _addressed(now, dispatcher.name)
            parts.append((dispatcher, now))
        same = all(new is old for (_, new), (_, old) in zip(parts, settlement.parts, strict=True))
        return settlement if same else _merged(delivery, parts)

    async def _refused(self, dispatcher: Dispatcher, part: Settlement, error: SendError) -> Settlement:
        settlement = await dispatcher.refused(part, error)
        if settlement.verdict is not part.verdict:  # else only a reply is left out
            await self._answer_failure(settlement)
        return settlement

    # --- finding --------------------------------------------------------------------------------

    def _find(self, message: Message) -> list[Dispatcher]:
        kind = event_type(message) if message.enveloped else message.type
        found = self._dispatchers.get(kind) or self._dispatchers.get(None)
        if found is None:
            return [self._unknown]
        if message.handler is not None and len(found) > 1:
            # If that handler has been renamed since, the message is for all that there are now.
            return [dispatcher for dispatcher in found if dispatcher.name == message.handler] or found
        return found

    async def _reject_unknown(self, message: Message) -> None:
        kind = "a message without a type" if message.type is None else repr(message.type)
        if self._by_call:  # the reason is the response, and a requester is not told the contracts
            raise Reject(f"There is no handler for {kind} here.")
        raise Reject(
            f"There is no handler for {kind} here. {suggest(message.type or '', self._handlers.known())} A handler "
            "whose first parameter is dict takes what has no other."
        )

    # --- sending --------------------------------------------------------------------------------

    def _answer(self, box: Outbox, message: Message, result: Any) -> None:
        """Reply to a request with what its handler returns, unless the handler has replied itself."""
        if box.replied or not is_request(message, result) or not self._factory.may_reply(message):
            return
        try:
            reply = self._factory.reply(message, result)
        except TypeError as error:
            # The handler has done its work. It must not run again because its result cannot be encoded.
            log.exception("The result of the handler of message %s of %r cannot be sent.", message.id, message.queue)
            reply = self._factory.reply(message, self._failure(message, error), type=FAILURE)
        box.add(self._sender, reply)

    def _failure(self, message: Message, error: BaseException | None, reason: str = "") -> Failure:
        why = describe(message, error, reason=reason)
        return Failure(why.exception, why.reason if self._failure_texts else "")

    async def _answer_failure(self, settlement: Settlement) -> None:
        """Reply to a request that failed for good, so that the requester does not wait until the timeout."""
        message = settlement.delivery.message
        failed = settlement.verdict.kind.copy is Copy.ERROR
        if not failed or message.intent != "request" or message.reply_to is None:
            return
        if self._by_call or not self._factory.may_reply(message):
            return
        failure = self._failure(message, settlement.error, settlement.verdict.reason)
        try:
            reply = self._factory.reply(message, failure, type=FAILURE)
            if self._together:
                settlement.outgoing += tuple(await self._sender.prepare([reply]))
            else:
                await self._sender.send_now([reply])
        except SendError as error:  # the requester gave the address
            log.warning("The failure of request %s of %r is not answered: %s", message.id, message.queue, error)
        except Exception:  # of a middleware or the broker: the message has its verdict anyway
            log.exception("The failure of request %s is not answered.", message.id)


def _addressed(part: Settlement, name: str) -> Settlement:
    """Have copies of the message itself name their handler; what a handler sent stays as it is."""
    own = part.delivery.message.id
    part.outgoing = tuple(m.replace(handler=name) if m.id == own else m for m in part.outgoing)
    return part


def _merged(delivery: Delivery, parts: list[tuple[Dispatcher, Settlement]]) -> Settlement:
    """One settlement for all handlers: first what each of them sends or has copied, then the acknowledgement."""
    if all(part.verdict.kind.gives_back for _, part in parts):
        return Settlement(delivery, RELEASE)
    return Shared(delivery, ACK, tuple(m for _, part in parts for m in part.outgoing), parts=parts)
