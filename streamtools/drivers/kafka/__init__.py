"""`kafka://`: Apache Kafka, by aiokafka."""

from streamtools.drivers.kafka.producer import KafkaProducer

__all__ = ["KafkaProducer"]
