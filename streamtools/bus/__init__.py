"""Commands and events: send, publish, defer, reply, request, subscribe, transaction.

contracts.py   what a command or an event is called
composer.py    what a verb is given, as a message
outbox.py      what waits for a handler or a transaction to succeed
verbs.py       what is sent, and when it leaves
bus.py         handlers, subscriptions, receiving, start and stop
entries.py     handlers by what they handle
dispatch.py    one delivery to all handlers of its type
loop.py        the loop of a bus's queue, for a runner
context.py     what a handler knows and sends
connections.py what a bus has open in one event loop
requests.py    who waits for which reply
pikabus.py     messages as PikaBus services write and read them
"""

from streamtools.bus.bus import Bus
from streamtools.bus.context import MessageContext
from streamtools.bus.contracts import Command, Event

__all__ = ["Bus", "Command", "Event", "MessageContext"]
