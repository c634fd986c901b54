"""AMQP 0-9-1: frames, properties, one connection and its channels."""
