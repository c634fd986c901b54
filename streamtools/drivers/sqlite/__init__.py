"""`sqlite://`: durable queues in one file, for any number of processes of one machine.

    producer.py, consumer.py, admin.py   what the base classes call
    database.py                          the event loop's end: who shares a file, requests and answers
    requests.py                          what is asked of the database thread
    worker.py                            the database thread: turns and transactions
    waiting.py                           consumers in that thread: those that wait, and their leases
    file.py                              one connection: begin, commit, the file's name; the disk's free room
    tables.py, statements.py             what is done with the tables, and the longer statements
    rows.py                              messages to rows and back
    schema.py                            the file itself, and what can be wrong with it

Space that deleted messages leave is used again by new ones; the file does not shrink, and it grows
no larger than what once waited in it together.
"""

from streamtools.drivers.sqlite.admin import SQLiteAdmin
from streamtools.drivers.sqlite.consumer import SQLiteConsumer
from streamtools.drivers.sqlite.producer import SQLiteProducer

__all__ = ["SQLiteAdmin", "SQLiteConsumer", "SQLiteProducer"]
