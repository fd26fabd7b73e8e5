"""The fused kernels, in Triton; imported only when one is launched or compiled.

`primitives` what they share, one file per kernel, `configurations` the tile sizes,
`launching` the grids, `ahead` compilation for a GPU that is not there.
"""
