"""Which requests are let in, and when."""
