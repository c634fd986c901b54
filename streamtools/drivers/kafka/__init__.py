"""`kafka://`: Apache Kafka, by aiokafka.

producer.py, consumer.py, admin.py   what the base classes call
consuming/    a member of a group, its partitions, commits, retries; delays.py: when a retry is delivered
producing/    records, batches, partitions, transactions
operating/    groups as an operator sees them, and reading without joining one
brokers/      requests to brokers: topics, offsets, bindings
client/       everything that reaches into aiokafka
records.py    messages to records and back       offsets.py   what is finished of a partition
errors.py     what a broker's error means        options.py, names.py, features.py

A message in:   client/fetched.py -> consuming/prefetch.py -> consumer.py `_take` -> the handler
                -> consuming/settling.py (-> copies.py, retries.py for a retry) -> offsets.py -> consuming/commits.py
A message out:  producer.py `_send` -> producing/record.py -> sender.py -> publisher.py
                -> partitions.py (which partition) -> partition_sender.py -> batches.py
"""

from streamtools.drivers.kafka.admin import KafkaAdmin
from streamtools.drivers.kafka.consumer import KafkaConsumer
from streamtools.drivers.kafka.producer import KafkaProducer

__all__ = ["KafkaAdmin", "KafkaConsumer", "KafkaProducer"]
