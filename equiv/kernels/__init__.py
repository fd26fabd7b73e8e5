"""Batched steering as kernels: hundreds of steers over one batch, one pass each way.

Symbols: h [*batch, d] an activation, n steers in a bank, `index` which of them each row
or token gets (−1 for none), `scale` how strongly.

    vector_shift       h + scale · bank[index]
    low_rank_shift     h + scale · upᵀ φ(down h + bias), down and up those of `index`
    candidate_shifts   h + scale[k] · bank[k] for every k: one h, many steers

Each has a reference that runs with PyTorch alone, and a fused Triton kernel; `impl`
says which, `implementation` what `None` comes to. They compute the same function: the
sum in float32 (float64 in float64), rounded once; rows that get no steer keep their
bits; a row's result does not depend on the rows beside it; nothing is summed in an
order that changes from run to run. Differentiable in every mode of PyTorch, `vmap` and
`torch.compile` included; those that end in an underscore work in place and are not.
"""

from equiv.kernels.api import candidate_shifts as candidate_shifts
from equiv.kernels.api import implementation as implementation
from equiv.kernels.api import low_rank_shift as low_rank_shift
from equiv.kernels.api import low_rank_shift_ as low_rank_shift_
from equiv.kernels.api import vector_shift as vector_shift
from equiv.kernels.api import vector_shift_ as vector_shift_
from equiv.kernels.banks import stack_ranks as stack_ranks
