"""Encoder: writes messages as frames for one channel."""

from __future__ import annotations

import time
from typing import Final

from streamtools.drivers.rabbitmq.amqp import frames, properties
from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.publishing.batch import Batch, Limits
from streamtools.drivers.rabbitmq.topology.delay_chain import DelayChain
from streamtools.message import Message

#: The most routes whose encoded frames are remembered.
ROUTES: Final = 1000


class Encoder:
    """Encodes messages, and remembers the frames that name their routes.

    Parameters:
        number: the number of the channel.
        frame_max: the most bytes of a frame.
        limits: the limits of the broker.
        chain: the queues of delayed messages.
    """

    def __init__(self, number: int, frame_max: int, limits: Limits, chain: DelayChain) -> None:
        self._number = number
        self._frame_max = frame_max
        self.limits = limits
        self._chain = chain
        self._routes: dict[tuple[str, str], bytes] = {}

    def encode(self, message: Message, batch: Batch) -> bytes:
        """Return all frames of a message.

        Raises:
            Unsendable: AMQP cannot carry the message, or its body is too large for this broker.
        """
        body, number, frame_max = message.body, self._number, self._frame_max
        if body is None:
            raise Unsendable("it has no body (a tombstone), which AMQP cannot carry; kafka:// can.")
        if len(body) > self.limits.body:
            raise Unsendable(
                f"its body is {len(body)} bytes; this broker takes {self.limits.body} (max_message_size). "
                "Store the data elsewhere, and send its address."
            )
        header = frames.header_frame(number, properties.encode(message), len(body), frame_max)
        return self._route(message, batch) + header + frames.body_frames(number, body, frame_max)

    def _route(self, message: Message, batch: Batch) -> bytes:
        if batch.delay_targets and (target := batch.delay_targets.get(id(message))) is not None:
            delayed = self._chain.route((message.deliver_at or 0.0) - time.time(), target)
            if delayed[1]:  # if empty, the message has become due meanwhile
                batch.delay_routes[id(message)] = delayed
        if batch.delay_routes and id(message) in batch.delay_routes:
            return frames.publish_frame(self._number, *batch.delay_routes[id(message)])
        exchange = "" if message.exchange is None else message.exchange.name
        route = self._routes.get((exchange, message.queue))
        if route is None:
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            route = frames.publish_frame(self._number, exchange, message.queue)
            self._routes[exchange, message.queue] = route
        return route
