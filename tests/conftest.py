"""Settings for every test: flax in tree mode, so that a graph-only feature fails at once; quick compilation."""

import os

os.environ.setdefault("NNX_GRAPH_MODE", "false")
os.environ.setdefault("NNX_GRAPH_UPDATES", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Tiny models compile for much longer than they run.
jax.config.update("jax_disable_most_optimizations", True)
