"""`kafka://`: Apache Kafka, by aiokafka.

producer.py, consumer.py, admin.py   what the base classes call
consuming/                           a member of a group; consuming/delays.py says when a retry comes
producing/                           batches, partitions, transactions
operating/                           groups as an operator sees them
brokers/                             topics, offsets and bindings
client/                              connections, and all that reaches into aiokafka
records.py                           messages to records and back
errors.py                            what a broker's error means
"""

from streamtools.drivers.kafka.admin import KafkaAdmin
from streamtools.drivers.kafka.consumer import KafkaConsumer
from streamtools.drivers.kafka.producer import KafkaProducer

__all__ = ["KafkaAdmin", "KafkaConsumer", "KafkaProducer"]
