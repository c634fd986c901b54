"""`sqlite://`: durable queues in one file, for any number of processes of one machine.

    producer.py, consumer.py, admin.py   what the base classes call
    database.py                          the event loop's end: who shares a file, questions and answers
    worker.py                            the database thread: transactions, waiting, leases
    tables.py                            the statements
    rows.py                              messages to rows and back
    schema.py                            the file itself, and what can be wrong with it

Space that deleted messages leave is used again by new ones; the file does not shrink, and it grows
no larger than what once waited in it together.
"""

from streamtools.drivers.sqlite.admin import SQLiteAdmin
from streamtools.drivers.sqlite.consumer import SQLiteConsumer
from streamtools.drivers.sqlite.producer import SQLiteProducer

__all__ = ["SQLiteAdmin", "SQLiteConsumer", "SQLiteProducer"]
