"""Strict settings for every test: flax in tree mode, so that a graph-only feature fails at once."""

import os

os.environ.setdefault("NNX_GRAPH_MODE", "false")
os.environ.setdefault("NNX_GRAPH_UPDATES", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
