"""The way of a message through the library, below what users call and above the drivers' protocols.

`endpoint` connects, `loop` receives, `dispatch` runs the handler and decides, `batching` and `settling` settle.
"""
