"""The engine: what happens to a message between the classes that users call and the drivers.

`endpoint` connects, `loop` receives, `dispatch` runs the handler and decides, `settler` and `settling` settle.
"""
