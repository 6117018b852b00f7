"""One door to attention, and the kernels behind it: blocks that a rule lets see each other, and nothing else.

`dispatch` is the door; `blocks` finds the blocks, `tpu` (Mosaic) and `gpu` (Triton) attend to them.
"""
