"""Makes messages of other messages: copies of failed ones, smaller copies, the message inside an envelope."""
