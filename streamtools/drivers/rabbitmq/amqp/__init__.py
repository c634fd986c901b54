"""AMQP 0-9-1: frames, properties, connections and channels."""
