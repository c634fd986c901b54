"""The registries as type checkers see them: a built-in name gives the class of its driver.

`from streamtools import PRODUCERS` leads type checkers and editors here. At run time nothing imports this file, and a
driver is imported when its protocol is first used.
"""

from typing import TYPE_CHECKING, Literal, overload

from streamtools.consumer import Consumer
from streamtools.producer import Producer
from streamtools.registry import Registry

if TYPE_CHECKING:
    from streamtools.drivers.asyncio import AsyncIOConsumer, AsyncIOProducer
    from streamtools.drivers.http import HTTPConsumer, HTTPProducer
    from streamtools.drivers.kafka import KafkaConsumer, KafkaProducer
    from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
    from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer

    class Producers(Registry[Producer]):
        """Protocol name to producer class."""

        @overload
        def __getitem__(self, name: Literal["asyncio", "AsyncIOHandler"]) -> type[AsyncIOProducer]: ...
        @overload
        def __getitem__(self, name: Literal["sqlite"]) -> type[SQLiteProducer]: ...
        @overload
        def __getitem__(self, name: Literal["rabbitmq", "RMQIOHandler"]) -> type[RabbitMQProducer]: ...
        @overload
        def __getitem__(self, name: Literal["kafka", "KafkaHandler"]) -> type[KafkaProducer]: ...
        @overload
        def __getitem__(self, name: Literal["http", "HTTPHandler"]) -> type[HTTPProducer]: ...
        @overload
        def __getitem__(self, name: str) -> type[Producer]: ...
        def __getitem__(self, name: str) -> type[Producer]: ...

    class ConsumerLoops(Registry[Consumer]):
        """Protocol name to consumer class."""

        @overload
        def __getitem__(self, name: Literal["asyncio", "AsyncIOHandler"]) -> type[AsyncIOConsumer]: ...
        @overload
        def __getitem__(self, name: Literal["sqlite"]) -> type[SQLiteConsumer]: ...
        @overload
        def __getitem__(self, name: Literal["rabbitmq", "RMQIOHandler"]) -> type[RabbitMQConsumer]: ...
        @overload
        def __getitem__(self, name: Literal["kafka", "KafkaHandler"]) -> type[KafkaConsumer]: ...
        @overload
        def __getitem__(self, name: Literal["http", "HTTPHandler"]) -> type[HTTPConsumer]: ...
        @overload
        def __getitem__(self, name: str) -> type[Consumer]: ...
        def __getitem__(self, name: str) -> type[Consumer]: ...

    PRODUCERS: Producers
    CONSUMER_LOOPS: ConsumerLoops
