"""What a service must survive: its broker killed, itself killed, messages that fail, messages that kill.

Each test prints its counts; `pytest -s -rP tests/chaos` shows them.
"""
