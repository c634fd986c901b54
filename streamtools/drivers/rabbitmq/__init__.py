"""`amqp(s)://`: RabbitMQ by aio-pika.

connections the two that a process shares          link        one connection: made, watched, given up as a whole
channel     the hot path: deliveries and confirms taken out of the byte stream, in bulk
frames      the frames of the hot path             properties  a Message as AMQP properties, and back
publisher   publishing with confirms, one channel  intake      receiving and acknowledging
outlet      publishing again on a fresh channel    topology    declaring and comparing queues
batch       what became of a call's messages       copies      what leaves before its delivery is settled
delay       the chain of TTL levels                lock        one consumer at a time
errors      the client's errors become ours
"""

from streamtools.drivers.rabbitmq.admin import RabbitMQAdmin
from streamtools.drivers.rabbitmq.consumer import RabbitMQConsumer
from streamtools.drivers.rabbitmq.producer import RabbitMQProducer
from streamtools.drivers.rabbitmq.topology import MakingOptions, QueueOptions

__all__ = ["MakingOptions", "QueueOptions", "RabbitMQAdmin", "RabbitMQConsumer", "RabbitMQProducer"]
