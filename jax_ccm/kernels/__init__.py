"""Pallas kernels of `jax_ccm.attention`: the blocks that a rule lets see each other, and nothing else.

`blocks` finds them, `tpu` (Mosaic) and `gpu` (Triton) attend to them, `cost` counts them.
"""
