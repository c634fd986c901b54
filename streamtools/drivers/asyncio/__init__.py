"""`asyncio://`: queues within this process. The first driver for a driver author to read.

A message sent is appended to its queue's `ready`, or to the heap of `later` until it is due; a
consumer takes it from there, holds it until it is settled, and puts it back in its place if it is
released. That is all a protocol needs to do: retries, the error queue and the worker pool stand
above it.

producer.py, consumer.py, admin.py   the hooks
broker.py                            all queues of one name, and where a message goes
queues.py, waiters.py                one queue, and who waits for it
"""

from streamtools.drivers.asyncio.admin import AsyncIOAdmin
from streamtools.drivers.asyncio.consumer import AsyncIOConsumer
from streamtools.drivers.asyncio.producer import AsyncIOProducer

__all__ = ["AsyncIOAdmin", "AsyncIOConsumer", "AsyncIOProducer"]
