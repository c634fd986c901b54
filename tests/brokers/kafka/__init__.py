"""Apache Kafka: its jars from Maven, nodes and clusters, its own command-line tools."""
