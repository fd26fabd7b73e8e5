"""`equiv.to_weights`: steering as a weight edit, where it is one."""

from collections.abc import Mapping

from torch import nn

from equiv.errors import NoExactFormError
from equiv.model.guard import check_model
from equiv.model.sites import SiteKey
from equiv.steering.applying.apply import by_layer
from equiv.steering.applying.positions import Positions
from equiv.steering.forms.form import Steering
from equiv.steering.weights.halves import blocks_of
from equiv.steering.weights.new_biases import room_for
from equiv.steering.weights.weight_edit import WeightEdit
from equiv.steering.weights.weight_rules import Edited, edits_of_block


def to_weights(steering: Mapping[SiteKey, Steering], model: nn.Module) -> WeightEdit:
    """The weight edit that does exactly what steering does, if there is one.

    Exact to rounding, for every token, in eval mode. What is one, with L the attention
    or MLP's last projection:

    - a fixed vector at attn_out, mlp_out, resid_mid or block_out: the bias of L, or of
      the LayerNorm that a post-norm block (BERT) ends its stream's sum with;
    - a linear or affine map, LoReFT or scale at attn_out and mlp_out: a low-rank edit
      of L, and its bias; so is what reads these and writes resid_mid and block_out;
    - any of them at attn_heads and mlp_hidden, which L reads, also where they write
      attn_out and mlp_out;
    - any of them at mlp_in: an edit of the layers that read it (gate and up).

    Several steers in a layer compose. Nothing else is a weight edit: an activation
    function (`LowRankMLP`), some positions only, what depends on the stream, and
    anything added behind a norm that follows L (Gemma-2, OLMo-2).

    Args:
        steering: (layer, site) → steering, as for `equiv.steer`.
        model: A Hugging Face model of a known family.

    Returns:
        The edit, to `apply` to the model or to `save_peft`.

    Raises:
        NoExactFormError: If a steer is no weight edit; the message says which and why.
        SiteError: If a layer or site does not exist.
        ArgumentError: If `steering` is no mapping, or of other widths than the model.
        UnsupportedModelError: If the model is of no known family, or what would be
            edited is no plain layer or shares its weight.

    Example:
        >>> import torch
        >>> from equiv.steering.forms.affine import Affine
        >>> from equiv.testing.models import transformer
        >>> model, draw = transformer("gpt2"), torch.Generator().manual_seed(0)
        >>> steering = Affine(torch.randn(2, 16, generator=draw), torch.ones(16, 2))
        >>> edit = to_weights({(1, "mlp_out"): steering}, model)
        >>> edit
        WeightEdit of a GPT2LMHeadModel:
          layer 1: mlp.c_proj: weight by rank 2 and bias (Affine at mlp_out)
        >>> edited = edit.apply(model)
    """
    check_model(model)
    blocks = blocks_of(model)
    layers = by_layer(steering)
    positions = getattr(steering, "positions", "all")
    if not Positions.parse(positions).everything:
        raise NoExactFormError(
            f"The steering is for positions {positions!r}, and weights act on every "
            'token: expected positions "all".'
        )
    edits: list[Edited] = []
    for index, steers in layers.items():
        blocks.block(index)
        edits += edits_of_block(model, blocks, index, steers)
    new = [
        f"{edited.layer.name}.bias"
        for edited in edits
        if edited.bias is not None and not edited.layer.has_bias
    ]
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return WeightEdit(tuple(edits), room_for(model, new), type(model).__name__, name)
