"""`kafka://`: Apache Kafka, by aiokafka."""

from streamtools.drivers.kafka.admin import KafkaAdmin
from streamtools.drivers.kafka.producer import KafkaProducer

__all__ = ["KafkaAdmin", "KafkaProducer"]
