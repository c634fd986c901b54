"""`asyncio://`: queues within this process. A driver author should read this driver first.

A producer appends a message to `ready` of its queue, or puts it into the heap `later` until it is due. A consumer
takes the message from there and holds it until it is settled. If it is released, the consumer puts it back into its
place. A driver needs to do no more: the core adds retries, the error queue and the concurrency of handlers.

producer.py, consumer.py, admin.py   the hooks
broker.py                            all queues of one name, and the routes of messages
queues.py, waiters.py                one queue, and the tasks that wait for it
"""

from streamtools.drivers.asyncio.admin import AsyncIOAdmin
from streamtools.drivers.asyncio.consumer import AsyncIOConsumer
from streamtools.drivers.asyncio.producer import AsyncIOProducer

__all__ = ["AsyncIOAdmin", "AsyncIOConsumer", "AsyncIOProducer"]
