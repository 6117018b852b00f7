"""Slots and rules: who sees whom, and how text is laid out."""
