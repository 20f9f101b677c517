"""x @ W_r^T on a GPU, from planes in tiles of which a product at r bits is handed those of r bits (docs/GPU.md).

layout   the tiles, and planes that move to host memory and back       (no Triton)
jit      the Triton kernels        launch   their grids and arguments
ops      torch operators           table    which kernel, with which blocks
tune     fills the table           graphs   captured steps, one a plan
"""
