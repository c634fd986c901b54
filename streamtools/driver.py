"""What the author of a driver writes: hooks of three base classes, and what they may raise.

A driver is a module with up to three classes, each of which names the protocol in its class statement:

    class BoxesProducer(Producer, protocol="boxes"): ...
    class BoxesConsumer(Consumer, protocol="boxes"): ...
    class BoxesAdmin(QueueAdmin, protocol="boxes"): ...

`Producer`, `Consumer` and `QueueAdmin` call the hooks on this page; users call the public methods alone. Each driver
defines the hooks that are marked `@required`; the others have a default. A driver that defines `_settle` needs none
of the four that `_settle` calls. Hooks raise the errors that are imported here, each with the client library's error
as its cause, and do not try again: the base classes do that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict

from streamtools.delivery import Delivery as Delivery
from streamtools.delivery import Reads
from streamtools.delivery import Settlement as Settlement
from streamtools.delivery import publish_first as publish_first
from streamtools.delivery import read_message as read_message
from streamtools.errors import ConfigurationError as ConfigurationError
from streamtools.errors import ConnectError as ConnectError
from streamtools.errors import ConnectionLost as ConnectionLost
from streamtools.errors import FeatureError
from streamtools.errors import QueueError as QueueError
from streamtools.errors import SendError as SendError
from streamtools.exchange import Binding
from streamtools.features import Features as Features
from streamtools.message import Message as Message
from streamtools.protocols import that_can
from streamtools.queues import GroupInfo, Place, QueueInfo, QueueSettings
from streamtools.receipt import Receipt as Receipt
from streamtools.validation.checks import check_name, check_not_ours
from streamtools.verdicts import ACK, RELEASE

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

F = TypeVar("F", bound=Callable[..., Any])


class Options(BaseModel):
    """The base of a driver's options: frozen, and nothing beyond the declared names."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )


def required(hook: F) -> F:
    """Mark a hook that each driver defines: without a definition, calling it raises a TypeError that says so."""

    @wraps(hook)
    def undefined(self: object, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} does not define {hook.__name__}().")

    return cast(F, undefined)


class EndpointHooks:
    """Hooks of producers and consumers.

    Attributes:
        protocol: set by `protocol=` in the class statement.
        features: what the protocol can do.
        settings_class: reads the URL.
        options_class: the protocol's own options of the constructor.
        settings: what the URL says.
    """

    settings: ProtocolSettings
    protocol: ClassVar[str] = ""
    features: ClassVar[Features] = Features()
    settings_class: ClassVar[type[ProtocolSettings]]
    options_class: ClassVar[type[Options]] = Options

    async def _open(self) -> None:
        """Connect and declare. Called again after ConnectionLost; must first discard what is left of before.

        When it raises, or is cancelled, `_close` is called.

        Raises:
            ConnectError: with permanent=True when trying again cannot help.
            QueueError: about the queue.
        """

    async def _close(self) -> None:
        """Let go of everything; idempotent, and works while another hook is blocked."""

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        """Check a queue's name; never rewrite it.

        Raises:
            ConfigurationError: the name cannot be used.
        """
        check_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        """Check where a reply is to go, which another program has chosen: the one rule about such addresses.

        Raises:
            ConfigurationError: it cannot be a queue, or is one that takes no replies.
        """
        cls.validate_queue(queue)
        check_not_ours(queue)


class ProducerHooks(EndpointHooks):
    """Hooks of producers.

    Attributes:
        send_options_class: the protocol's own options of `send`.
    """

    send_options_class: ClassVar[type[Options]] = Options

    @required
    async def _send(self, batch: Sequence[Message], options: Any) -> Sequence[Receipt] | None:
        """Return when the broker holds every message of `batch`, each in the queue that it names.

        Returns:
            Receipts in the order of `batch` where the protocol has something to add, else None.

        Raises:
            SendError: naming those that it does not hold.
            ConnectionLost: the connection ended; nothing of the batch is known. The base reopens and
                sends the batch again, with the same ids.
        """
        raise NotImplementedError

    def _why_unconfirmed(self) -> str:
        """A sentence on why `_send` has not returned in time, as far as is known."""
        return f"no confirmation came from {self.settings.safe_url}."


class ConsumerHooks(EndpointHooks):
    """Hooks of consumers.

    Attributes:
        poll_timeout: seconds in which `_receive` has surely found what is there.
        drops_expired: messages that have expired are not handed over; an operator's reader sees them all the same.
    """

    poll_timeout: ClassVar[float] = 0.25
    drops_expired: ClassVar[bool] = True
    #: None where the driver defines `_receive` itself, and while nothing was read.
    _reads: Reads | None = None

    @required
    async def _read(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages, and return at most `limit`; one call at a time.

        It is cancelled only before `_stop` and `_close`. A client library may ignore that: it is cancelled again, and
        `_close` follows after a second. What it returns is kept until somebody receives it.

        Raises:
            ConnectionLost: the connection ended.
        """
        raise NotImplementedError

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for at least one message and return at most `limit`; one call at a time.

        As it stands, it waits for `_read` in a task of its own. Drivers that can wait without a task define this
        instead of `_read`. Then cancelling it must lose nothing: a message that is not returned stays with the
        broker, or is returned by the next call.

        Raises:
            ConnectionLost: the connection ended.
        """
        if self._reads is None:
            self._reads = Reads(self._read)
        return await self._reads.take(limit)

    async def _poll(self, limit: int) -> Sequence[Delivery]:
        """What is there now, at most `limit`; as it stands, what `_receive` finds within `poll_timeout` seconds.

        Written anew by drivers that can ask and be told that there is nothing.

        Raises:
            TimeoutError: there is nothing.
        """
        async with asyncio.timeout(self.poll_timeout):
            return await self._receive(limit)

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        """Send each one's `outgoing` and have it confirmed, then acknowledge (or give back) the delivery.

        May be called several times at once. Settling what is settled already does nothing.

        As it stands, it calls the four hooks below. A driver that sends and acknowledges in one step
        (`Features.atomic`) defines `_settle` instead of them.

        Raises:
            ConnectionLost: the connection ended; what was not settled is delivered again.
            SendError: the broker refused something outgoing; the deliveries concerned are still in
                hand, and those whose outgoing messages it took are settled. It names every message
                that the broker does not hold, unless `Features.atomic`: then none of a delivery has left.
        """
        ready: list[Settlement] = []
        sending: list[Settlement] = []
        for settlement in settlements:
            (sending if settlement.outgoing and self._holds(settlement.delivery) else ready).append(settlement)
        refused: SendError | None = None
        if sending:
            held, refused = await publish_first(self._publish, sending)
            ready += held
        acknowledged: list[Delivery] = []
        released: list[Delivery] = []
        for settlement in ready:
            (released if settlement.verdict.kind.gives_back else acknowledged).append(settlement.delivery)
        if released:
            await self._release(released)
        if acknowledged:
            await self._acknowledge(acknowledged)
        if refused is not None:
            raise refused

    @required
    def _holds(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled; if not, its messages are not sent.

        False for what is settled already, and for what came over a connection that has ended: for ever then.
        """
        raise NotImplementedError

    @required
    async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
        """Return when the broker holds every message, each in the queue that it names.

        Parameters:
            settlements: for each message the settlement that sends it.

        Raises:
            SendError: its `messages` are those that the broker does not hold, or may not hold. All others are taken
                to be held.
            ConnectionLost: the connection ended; nothing is known. If messages leave by a connection of their own
                that has ended, raise a SendError instead: the deliveries are then kept, and sending is tried again.
        """
        raise NotImplementedError

    @required
    async def _acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Have the broker forget these deliveries; skip those that are settled already.

        Raises:
            ConnectionLost: the connection ended, or some came over an earlier one; the others are settled first.
        """
        raise NotImplementedError

    @required
    async def _release(self, deliveries: Sequence[Delivery]) -> None:
        """Give these deliveries back as they came; skip those that are settled already.

        Raises:
            ConnectionLost: the connection ended; they go back with it.
        """
        raise NotImplementedError

    async def _ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge all of them; written anew by drivers that need no Settlement for each.

        Raises:
            ConnectionLost: as for `_settle`.
        """
        await self._settle([Settlement(delivery, ACK) for delivery in deliveries])

    async def _redeclare(self) -> None:
        """Make again what `_open` declares, where it is missing; asked for when an outgoing message was refused.

        Raises:
            ConnectionLost: the connection ended.
            QueueError: about a queue.
        """

    async def _stop(self) -> None:
        """Take in no more; called once before the last settlements. Deliveries in hand stay so.

        As it stands, it ends `_read`, and gives back what that has returned and nobody has received.
        """
        if self._reads is not None and (kept := await self._reads.end()):
            await self._settle([Settlement(delivery, RELEASE) for delivery in kept])

    def _ordering_key(self, delivery: Delivery) -> Hashable:
        """Deliveries of which this is the same are handled one after the other; None: of no matter."""
        return delivery.message.key


class Reader(Protocol):
    """What an admin reads a queue with: a consumer of the same protocol."""

    async def open(self) -> Any: ...
    async def receive(self, max_messages: int = 1, *, timeout: float | None = None) -> list[Delivery]: ...
    async def _settle(self, settlements: Sequence[Settlement]) -> None: ...
    async def _stop(self) -> None: ...
    async def close(self) -> None: ...


class AdminHooks:
    """Hooks of admins.

    Attributes:
        protocol: set by `protocol=` in the class statement.
        settings_class: reads the URL.
    """

    protocol: ClassVar[str] = ""
    settings_class: ClassVar[type[ProtocolSettings]]

    async def _open(self) -> None:
        """Connect."""

    async def _close(self) -> None:
        """Let go of everything; idempotent."""

    @required
    async def _list(self) -> Sequence[QueueInfo]:
        """Every queue, in any order."""
        raise NotImplementedError

    @required
    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        """Make a queue if it is missing."""
        raise NotImplementedError

    @required
    async def _delete(self, queue: str) -> None:
        """Delete a queue, or raise QueueError."""
        raise NotImplementedError

    @required
    async def _purge(self, queue: str) -> int:
        """Forget what waits, or raise QueueError."""
        raise NotImplementedError

    @required
    async def _stats(self, queue: str) -> QueueInfo:
        """One queue's numbers, or raise QueueError."""
        raise NotImplementedError

    @required
    def _reader(self, queue: str, prefetch: int) -> Reader:
        """A consumer of this queue that declares nothing and can hold `prefetch` deliveries in hand."""
        raise NotImplementedError

    def _viewer(self, queue: str, most: int) -> Reader | None:
        """What shows up to `most` messages as they come and leaves them; None where a consumer that closes does."""
        return None

    async def _describe(self, queue: str) -> QueueSettings:
        """How a queue is kept, or raise QueueError."""
        raise self._cannot("has no partitions and keeps no message that is done, so there is nothing to describe")

    async def _alter(
        self, queue: str, partitions: int | None, retention: float | None, retention_bytes: float | None
    ) -> None:
        """Change what is not None, and nothing else."""
        raise self._cannot("has no partitions and keeps no message that is done, so there is nothing to alter")

    async def _groups(self, queue: str) -> Sequence[GroupInfo]:
        """The groups of a queue, in any order."""
        raise self._cannot("counts no lag of groups; stats() has its numbers")

    async def _seek(self, queue: str, to: Place, group: str, partition: int | None) -> GroupInfo:
        """Move a group."""
        raise self._cannot("forgets a message when it is done, so no group can go back or ahead")

    def _cannot(self, why: str) -> FeatureError:
        return FeatureError(f"{self.protocol} {why}. {that_can('replay')} can.")

    async def _bind(self, queue: str, binding: Binding) -> None:
        """Bind a queue, or raise QueueError."""
        raise FeatureError(f"{self.protocol!r} has no exchanges: send to each queue by its name.")

    async def _unbind(self, queue: str, binding: Binding) -> None:
        """Take a binding away."""
        raise FeatureError(f"{self.protocol!r} has no exchanges.")

    async def _cancel(self, queue: str, id: str) -> bool:  # noqa: A002
        """Forget a delayed message; whether it was there."""
        raise FeatureError(f"{self.protocol!r} does not let a delayed message be taken back: have its handler look.")
