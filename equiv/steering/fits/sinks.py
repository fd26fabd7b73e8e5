"""Which tokens a fit uses: all that count, but not the sinks at first positions.

Many decoders park activations a hundred times larger than any other in the residual
stream at the first position (attention sinks). They would dominate a least-squares fit,
and nobody means to steer them. Where there is no sink the first token is fitted like
any other: a map that has not seen it, applied to it, is an extrapolation, and the other
tokens attend to what comes of it.

What tells a sink is the stream after the block, whatever the site: in a post-norm
encoder (MiniLM) the MLP writes far more at the first token than elsewhere, which the
norm after it takes away, and fits at mlp_out need that token.
"""

import torch
from torch import Tensor

from equiv.model.batches import first_unmasked
from equiv.model.sites import Sites

# A first position whose activations are this many times larger than the others' is a
# sink. Ordinary first tokens stay below 3, sinks are far above 50.
SINK = 10.0


def fitted_tokens(
    mask: Tensor, stream: Tensor, *, first_position: bool | None = None
) -> Tensor:
    """The tokens that a fit uses, bool like `mask`.

    Args:
        mask: Tokens that count, bool [batch, seq] or [tokens].
        stream: Base activation that tells sinks, [batch, seq, d].
        first_position: Whether the first token of each sequence that counts is used;
            `None`: unless it is a sink.

    Example:
        >>> h = torch.ones(1, 3, 2)
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> fitted_tokens(mask, h)
        tensor([[True, True, True]])
        >>> h[0, 0] = 500.0
        >>> fitted_tokens(mask, h)
        tensor([[False,  True,  True]])
    """
    first = first_unmasked(mask)
    rest = mask & ~first
    if first_position or not bool(first.any()) or not bool(rest.any()):
        return mask
    if first_position is None and not _sinks(stream, first, rest):
        return mask
    return rest


def stream_of(sites: Sites, site: str) -> Tensor:
    """The residual stream after a block; the site itself where there is no block."""
    return sites.get("block_out", sites[site])


def _sinks(h: Tensor, first: Tensor, rest: Tensor) -> bool:
    if h.shape[:2] != first.shape:  # pooled: no positions
        return False
    norms = torch.linalg.vector_norm(h, dim=-1)
    return bool(norms[first].mean() > SINK * norms[rest].mean())
