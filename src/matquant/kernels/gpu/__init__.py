"""x @ W_r^T on a GPU, from planes in tiles of which a product at r bits is handed those of r bits (docs/GPU.md).

layout       the tiles, and planes that move to host memory and back (no Triton)
jit          products, in Triton
jit_mma      products with few rows, in Gluon, for NVIDIA; jit_operands has its parts
jit_weight   planes into tiles, and tiles into the dense weight, in Triton
launch       grids and arguments of these
ops          torch operators
table, tune  which kernel with which blocks; measurements that fill the table
graphs       captured steps, one a plan
"""
