"""Commands and events: send, publish, defer, reply, request, subscribe, transaction.

contracts.py          what a command or an event is called, and where it goes
message_factory.py    makes the message of what a verb is given
message_sender.py     the verbs, and when their messages leave
bus.py                handlers, subscriptions, receiving, start and stop
handler_registry.py   the handlers, by what they handle
fan_out.py            gives one delivery to all handlers of its type
bound.py              the handlers of a bus as one handler of a runner
context.py            what a handler knows of its message, and what it sends
connections.py        what a bus has open in one event loop
requests.py           who waits for which reply
"""

from streamtools.bus.bus import Bus
from streamtools.bus.context import MessageContext
from streamtools.bus.contracts import Command, Event

__all__ = ["Bus", "Command", "Event", "MessageContext"]
