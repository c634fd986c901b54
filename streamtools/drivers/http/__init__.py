"""`http://host:9000`: requests and answers over aiohttp.

A call, not a queue: nothing stands between the sender and the handler, so the sender keeps the
message until the handler's answer is there, and sends it again while the answer is "not yet".

Modules:
    options: what the driver can do, and its options.
    consumer, request_queue: each request becomes a delivery.
    responses: the answer to each request.
    server, connections, access, tls: the port, its limits, and who may ask.
    producer, troubles: each message is a request; what is tried again.
    headers: metadata and headers of a message as those of HTTP.
"""

from streamtools.drivers.http.consumer import HTTPConsumer
from streamtools.drivers.http.producer import HTTPProducer, HTTPReceipt

__all__ = ["HTTPConsumer", "HTTPProducer", "HTTPReceipt"]
