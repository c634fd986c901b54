"""`kafka://`: Apache Kafka, by aiokafka.

producer.py, consumer.py       what the base classes call
admin.py, reader.py            what an operator calls
publisher.py                   lanes to partitions, batches, what is refused
membership.py, track.py        the group, its partitions, commits
offsets.py                     what is finished of a partition, and how a commit tells it
tiers.py                       waiting for a time
records.py                     messages to records and back
topics.py, cluster.py          looking for topics, making and changing them
groups.py, ages.py             groups as an operator sees them, and how old what waits for them is
client.py, errors.py           connections, and what can be wrong with them
"""

from streamtools.drivers.kafka.admin import KafkaAdmin
from streamtools.drivers.kafka.consumer import KafkaConsumer
from streamtools.drivers.kafka.producer import KafkaProducer

__all__ = ["KafkaAdmin", "KafkaConsumer", "KafkaProducer"]
