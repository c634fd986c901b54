"""The features of RabbitMQ."""

from streamtools.features import Features

FEATURES = Features(durable=True, processes=True, delivery_count=True, topics=True)
