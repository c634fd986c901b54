"""All that reaches into aiokafka, the client library; nothing outside this room uses its private names."""
