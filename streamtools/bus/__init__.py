"""Commands and events: send, publish, defer, reply, request, subscribe, transaction.

bus.py                what users call: handlers, subscriptions, start and stop
message_sender.py     the verbs of a bus, and when a message leaves
context.py            the message in hand, and the verbs of a handler
message_factory.py    makes a message from what a verb is given
contracts.py          what a command or an event is called, and where it goes
handler_registry.py   the handlers of a bus, by what they handle
fan_out.py            gives a delivery to all handlers of its type
subscriptions.py      the topics whose messages come into the queue of a bus
transport.py          the producer, the consumers and the administrator of a bus
connections.py        what a bus has open in one event loop
requests.py           the reply queue, and the requests that wait for a reply
"""

from streamtools.bus.bus import Bus
from streamtools.bus.context import MessageContext
from streamtools.bus.contracts import Command, Event

__all__ = ["Bus", "Command", "Event", "MessageContext"]
