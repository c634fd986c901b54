"""`http://host:9000`: requests and answers over aiohttp.

There is no broker between the sender and the handler. So the sender keeps the message until the handler has answered,
and sends it again if the answer says that it should.

Modules:
    options: what the driver can do, and its options.
    consumer, request_queue: each request becomes a delivery.
    responses: the answer to each request.
    server, connections, access, tls: the port, its limits, and which requests are allowed.
    producer, troubles: each message is a request; which failures are tried again.
    headers: metadata and headers of a message as HTTP headers.
"""

from streamtools.drivers.http.consumer import HTTPConsumer
from streamtools.drivers.http.producer import HTTPProducer, HTTPReceipt

__all__ = ["HTTPConsumer", "HTTPProducer", "HTTPReceipt"]
