"""HandlerFanOut: one delivery to all handlers of its type, each with its own verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamtools.bus.handler_registry import Entry, HandlerRegistry, of_class
from streamtools.bus.message_factory import FAILURE, Failure, MessageFactory
from streamtools.delivery import Delivery, Settlement
from streamtools.engine.answering import is_request
from streamtools.engine.dispatch import Answer, Dispatcher, chain
from streamtools.engine.functions.invoke import Resolver, compile_handler
from streamtools.engine.messages.envelope import event_type
from streamtools.engine.messages.failures import describe
from streamtools.engine.messages.times import wrong_time
from streamtools.engine.outbox import Outbox, Sender
from streamtools.engine.replies import lost_replies
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import ConfigurationError, Reject, SendError, suggest
from streamtools.message import Message
from streamtools.types import Handler, Middleware
from streamtools.verdicts import ACK, RELEASE, Copy, Verdict

log: logging.Logger = logging.getLogger("streamtools")

#: Makes a dispatcher of a compiled handler, for an entry.
MakeDispatcher = Callable[[Handler, Entry, Answer | None], Dispatcher]


@dataclass(slots=True)
class Shared(Settlement):
    """What several handlers made of one message.

    Attributes:
        parts: each handler's name, dispatcher and settlement.
    """

    parts: list[tuple[str, Dispatcher, Settlement]] = field(default_factory=list)


class HandlerFanOut:
    """Turns a delivery into a settlement, by the handlers of its type.

    Each handler has its own verdict: a retry is a copy addressed to the handler that failed, so that one
    that succeeded is not run again because its sibling failed.

    Parameters:
        handlers: the handlers of the bus.
        factory: makes replies.
        make: compiled handler -> dispatcher.
        incoming: middleware, outermost first.
        resolvers: what further parameters may be annotated with.
        provided: what constructors of handler classes are given.
        threads: where `def` handlers run.
        sender: the bus, which sends the replies.
        together: what a handler sends leaves with the acknowledgement of its message; False where that came before.
        calls: the answer goes out on the same call, and not as a message (HTTP).
        holds: a message that arrives before its time is sent anew, delayed: other systems leave that to the receiver.
        failure_texts: a failed request is answered with the text of the error as well as with its class.
    """

    def __init__(
        self,
        handlers: HandlerRegistry,
        factory: MessageFactory,
        make: MakeDispatcher,
        *,
        incoming: Sequence[Middleware],
        resolvers: Mapping[type, Resolver],
        provided: Mapping[type, Any],
        threads: Threads,
        sender: Sender,
        together: bool,
        calls: bool,
        holds: bool = False,
        failure_texts: bool = False,
    ) -> None:
        self._failure_texts = failure_texts
        self._sender = sender
        self._together = together
        self._calls = calls
        self._holds = holds and together
        self._handlers = handlers
        self._factory = factory
        answer = None if calls else self._answer
        self._runs: dict[str | None, list[tuple[str, Dispatcher]]] = {}
        for entry in handlers:
            function = entry.function
            if isinstance(function, type):
                function = of_class(function, provided)
            compiled = compile_handler(function, threads, resolvers, entry.payload)
            self._runs.setdefault(entry.type, []).append((entry.name, make(chain(compiled, incoming), entry, answer)))
        nobody = Entry("The bus", None, None, self._reject_unknown, None)
        self._unknown = (nobody.name, make(chain(self._reject_unknown, incoming), nobody, answer))

    def stop(self) -> None:
        """Let retries that wait in place be given back at once."""
        for runs in (*self._runs.values(), [self._unknown]):
            for _, dispatcher in runs:
                dispatcher.stop()

    async def __call__(self, delivery: Delivery) -> Settlement:
        due = delivery.message.deliver_at
        if self._holds and due is not None and due > time.time():
            return Settlement(delivery, ACK, (delivery.message,))  # sent anew, so that the broker holds it
        runs = self._find(delivery.message)
        if len(runs) == 1:
            settlement = await runs[0][1](delivery)
            await self._answer_failure(settlement)
            return settlement
        parts = []
        over = False
        for name, dispatcher in runs:
            # Where one was cut short, the next are not begun: we stop.
            part = Settlement(delivery, RELEASE) if over else await dispatcher(delivery)
            if part.verdict.kind.gives_back:
                over, part.outgoing = True, (delivery.message,)
            parts.append((name, dispatcher, _addressed(part, name)))
        return _merged(delivery, parts)

    def settlement(
        self, delivery: Delivery, message: Message, verdict: Verdict, error: BaseException | None
    ) -> Settlement:
        """The verdict with the copies that it needs."""
        return self._find(message)[0][1].settlement(delivery, message, verdict, error)

    def fallbacks(self, settlement: Settlement, error: BaseException) -> Iterator[Settlement]:
        """Ever smaller forms of a settlement that cannot be performed as it is."""
        return self._find(settlement.delivery.message)[0][1].fallbacks(settlement, error)

    async def refused(self, settlement: Settlement, error: SendError) -> Settlement:
        """What a handler sent was refused: as if it had raised that, so its message is retried or rejected."""
        if (without := self._without_replies(settlement, error)) is not settlement:
            return without
        delivery = settlement.delivery
        if isinstance(settlement, Shared):
            parts = []
            for name, dispatcher, part in settlement.parts:
                now = await self._refused(dispatcher, part, error)
                parts.append(
                    (
                        name,
                        dispatcher,
                        _addressed(now, name) if now is not part else dispatcher.without_held(part, error),
                    )
                )
            same = all(new[2] is old[2] for new, old in zip(parts, settlement.parts, strict=True))
            return settlement if same else _merged(delivery, parts)
        return await self._refused(self._find(delivery.message)[0][1], settlement, error)

    def _without_replies(self, settlement: Settlement, error: SendError) -> Settlement:
        """The same without the replies that cannot be sent, and without what the broker holds already.

        The requester gave the address: that is not a failure of the handler.
        """
        lost = lost_replies(settlement.outgoing, error)
        if not lost:
            return settlement
        message = settlement.delivery.message
        log.warning("The reply to message %s of %r is not sent: %s", message.id, message.queue, error)
        if isinstance(settlement, Shared):
            parts = [(name, to, _without(to.without_held(part, error), lost)) for name, to, part in settlement.parts]
            return _merged(settlement.delivery, parts)
        return _without(self._find(message)[0][1].without_held(settlement, error), lost)

    async def _refused(self, dispatcher: Dispatcher, part: Settlement, error: SendError) -> Settlement:
        settlement = await dispatcher.refused(part, error)
        if settlement is not part:
            await self._answer_failure(settlement)
        return settlement

    # --- finding --------------------------------------------------------------------------------

    def _find(self, message: Message) -> list[tuple[str, Dispatcher]]:
        kind = event_type(message) if message.enveloped else message.type
        runs = self._runs.get(kind) or self._runs.get(None)
        if runs is None:
            return [self._unknown]
        if message.handler is not None and len(runs) > 1:
            # A handler that was renamed since: the message is for all that are there now.
            return [run for run in runs if run[0] == message.handler] or runs
        return runs

    async def _reject_unknown(self, message: Message) -> None:
        kind = "a message without a type" if message.type is None else repr(message.type)
        if self._calls:  # the reason is the answer, and whoever asks is no one to list the contracts to
            raise Reject(f"There is no handler for {kind} here.")
        raise Reject(
            f"There is no handler for {kind} here. {suggest(message.type or '', self._handlers.known())} A handler "
            "whose first parameter is dict takes what has no other."
        )

    # --- sending --------------------------------------------------------------------------------

    def _answer(self, box: Outbox, message: Message, result: Any) -> None:
        """What a handler returns is the reply to a request, if it has not replied itself."""
        if box.replied or not is_request(message, result) or not self._factory.may_reply(message):
            return
        try:
            reply = self._factory.reply(message, result)
        except TypeError as error:
            # The handler has done its work: it is not to do it again because its result has no form on the wire.
            log.exception("The result of the handler of message %s of %r cannot be sent.", message.id, message.queue)
            reply = self._factory.reply(message, self._failure(message, error), type=FAILURE)
        box.add(self._sender, reply)

    def _failure(self, message: Message, error: BaseException | None, reason: str = "") -> Failure:
        why = describe(message, error, reason=reason)
        return Failure(why.exception, why.reason if self._failure_texts else "")

    async def _answer_failure(self, settlement: Settlement) -> None:
        """A request that failed for good is answered, so that nobody waits for its timeout."""
        message = settlement.delivery.message
        failed = settlement.verdict.kind.copy is Copy.ERROR
        if not failed or message.intent != "request" or message.reply_to is None:
            return
        if self._calls or not self._factory.may_reply(message):
            return
        failure = self._failure(message, settlement.error, settlement.verdict.reason)
        try:
            reply = self._factory.reply(message, failure, type=FAILURE)
            if self._together:
                settlement.outgoing += tuple(await self._sender.prepare([reply]))
            else:
                await self._sender.send_now([reply])
        except SendError as error:  # whoever asked gave the address
            log.warning("The failure of request %s of %r is not answered: %s", message.id, message.queue, error)
        except Exception:  # a middleware's, or the broker's: the message has its verdict all the same
            log.exception("The failure of request %s is not answered.", message.id)


async def pass_middleware(messages: Sequence[Message], outgoing: Sequence[Middleware]) -> list[Message]:
    """Messages as the outgoing middleware lets them go."""
    if not outgoing:
        return list(messages)
    let_go: list[Message] = []

    async def last(message: Message) -> None:
        if (why := wrong_time(message)) is not None:
            raise ConfigurationError(f"An outgoing middleware has changed message {message.id}: {why}.")
        let_go.append(message)

    way = chain(last, outgoing)
    for message in messages:
        await way(message)
    return let_go


def _without(settlement: Settlement, lost: frozenset[str]) -> Settlement:
    return replace(settlement, outgoing=tuple(m for m in settlement.outgoing if m.id not in lost))


def _addressed(part: Settlement, name: str) -> Settlement:
    """Copies of the message itself name the handler that they are for; what a handler sent stays as it is."""
    own = part.delivery.message.id
    part.outgoing = tuple(m.replace(handler=name) if m.id == own else m for m in part.outgoing)
    return part


def _merged(delivery: Delivery, parts: list[tuple[str, Dispatcher, Settlement]]) -> Settlement:
    """One settlement for all handlers: what each sends or has copied goes out, then the message is done."""
    if all(part.verdict.kind.gives_back for _, _, part in parts):
        return Settlement(delivery, RELEASE)
    outgoing = tuple(m for _, _, part in parts for m in part.outgoing)
    return Shared(delivery, ACK, outgoing, parts=parts)
