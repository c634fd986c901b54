"""`amqp(s)://`: RabbitMQ by aio-pika.

Modules:
    options: the options of producers and consumers, and the queues that they describe.
    connections: the two connections that a process shares, one for sending and one for receiving.
    errors: the client library's errors become ours.
    amqp: connections, channels, frames and properties.
    topology: queues, exchanges, bindings, and the queues that hold delayed messages.
    publishing: the producer, and how it sends with confirms.
    consuming: the consumer, and how it receives and settles.
    looking: for operators: queues are listed, looked at and changed.
    rare: states of a broker that are very rare, each in a module of its own.
"""

from streamtools.drivers.rabbitmq.consuming.consumer import RabbitMQConsumer
from streamtools.drivers.rabbitmq.looking.admin import RabbitMQAdmin
from streamtools.drivers.rabbitmq.options import ProducerOptions, QueueOptions
from streamtools.drivers.rabbitmq.publishing.producer import RabbitMQProducer

__all__ = ["ProducerOptions", "QueueOptions", "RabbitMQAdmin", "RabbitMQConsumer", "RabbitMQProducer"]
