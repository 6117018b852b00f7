"""The heart: parallel forward, recurrence, cache, and what is built on them."""
