"""`amqp(s)://`: RabbitMQ by aio-pika.

Modules:
    options: the options of producers and consumers, and the queues that they describe.
    connections: the two connections of a process, one for sending and one for receiving.
    errors: translates the client library's errors into ours.
    amqp: connections, channels, frames and properties.
    topology: queues, exchanges, bindings, and the queues that hold delayed messages.
    publishing: the producer, and how it sends with confirms.
    consuming: the consumer, and how it receives and settles.
    looking: the operator's side: lists, reads and changes queues.
    rare: very rare states of a broker, each in its own module.
"""

from streamtools.drivers.rabbitmq.consuming.consumer import RabbitMQConsumer
from streamtools.drivers.rabbitmq.looking.admin import RabbitMQAdmin
from streamtools.drivers.rabbitmq.options import ProducerOptions, QueueOptions
from streamtools.drivers.rabbitmq.publishing.producer import RabbitMQProducer

__all__ = ["ProducerOptions", "QueueOptions", "RabbitMQAdmin", "RabbitMQConsumer", "RabbitMQProducer"]
