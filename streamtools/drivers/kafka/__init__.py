"""`kafka://`: Apache Kafka, by aiokafka."""
