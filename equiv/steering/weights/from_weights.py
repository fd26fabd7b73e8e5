"""`equiv.to_steering`: a weight update as steering, where it is one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from equiv.errors import UpdateMismatchError
from equiv.model.families import Architecture, Blocks
from equiv.model.guard import check_model
from equiv.model.loading import load_model
from equiv.model.sites import SiteKey
from equiv.steering.files.digests import update_digest
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.weights.deltas import as_dense
from equiv.steering.weights.differences import Differences
from equiv.steering.weights.halves import blocks_of, layer_at, without_adapter
from equiv.steering.weights.steer_rules import covered, no_steering, steers_of_block
from equiv.steering.weights.weight_edit import WeightEdit
from equiv.update.adapters import clean, from_directory, from_model, is_peft
from equiv.update.low_rank import Delta, norm_of
from equiv.update.sources import resolve
from equiv.update.update import Update


def to_steering(update: object, model: nn.Module) -> SteeringSet:
    """The steering that does exactly what a weight update does, if there is one.

    Exact to the rounding of the weights' dtype, for every token, in eval mode. What is
    steering, with L the attention or MLP's last projection:

    - L's weight: reads attn_heads or mlp_hidden, writes attn_out or mlp_out. Low-rank
      factors stay factors, and a dense difference gets the rank it has;
    - L's bias: a vector at attn_out or mlp_out; a bias of the values: at attn_out;
    - both behind a norm that follows L (Gemma-2, OLMo-2): at attn_heads or mlp_hidden,
      where L reaches them from there;
    - the MLP's first layers (gate and up), where one map of mlp_in does it for all;
    - the LayerNorms of a post-norm block (BERT): at resid_mid and block_out.

    Nothing else is taken: queries, keys and the values' weights act before attention
    mixes the tokens, embeddings and the language head are outside the blocks.

    Args:
        update: An `equiv.Update`, a mapping of parameter name → difference, a
            `WeightEdit`, a tuned model, a `PeftModel` (LoRA, BEFT or what PEFT can
            merge), or a path or hub id of these. It may hold biases that the base
            lacks, where its layers could have them.
        model: The base, a Hugging Face model of a known family.

    Returns:
        The steering, for `equiv.steer`.

    Raises:
        NoExactFormError: If a parameter's difference is no steering; the message says
            which and why.
        UpdateError: If `update` is no update, or does not fit the model.
        UnsupportedModelError: If the model is of no known family, or what is updated is
            no plain layer or shares its weight.

    Example:
        >>> from equiv.testing.models import transformer
        >>> model = transformer("llama")
        >>> bias = {"model.layers.1.self_attn.o_proj.bias": torch.ones(16)}
        >>> to_steering(bias, model)
        SteeringSet(1 steers at attn_out, 16 parameters)
    """
    check_model(model)
    blocks = blocks_of(model)
    given = _differences(update, model)
    changed = {n: d for n, d in given.deltas.items() if norm_of(d) > 0}
    found = Update(changed, {}, given.source)
    _check_covered(found, blocks)
    entries: dict[SiteKey, Steering] = {}
    for index in range(len(blocks.modules)):
        own = Differences(model, f"{blocks.path}.{index}", found.deltas)
        steers = steers_of_block(blocks.architecture, own)
        entries |= {(index, site): steering for site, steering in steers.items()}
    about = {"update": {"source": found.source, "sha256": update_digest(found)}}
    return SteeringSet(entries, about=about)


def _differences(update: object, model: nn.Module) -> Update:
    """An update that fits the model but for biases that the base does not have."""
    if isinstance(update, WeightEdit):
        update.check_fits(model)
        return Update.from_dict(update.deltas, source="steering as weights")
    if isinstance(update, (str, Path)):
        update = _from_folder(Path(update), model) or update
    elif is_peft(update):
        assert isinstance(update, nn.Module)
        update = from_model(update, model)
    elif isinstance(update, nn.Module):
        update = _between(model, update)
    elif isinstance(update, Mapping):
        update = Update.from_dict(update)
    given = update.deltas if isinstance(update, Update) else {}
    new = {n: _new_bias(model, n, d) for n, d in given.items() if _lacks(model, n)}
    if isinstance(update, Update) and new:
        old = {n: d for n, d in given.items() if n not in new}
        fitted = resolve(model, Update(old, {}, update.source)).deltas if old else {}
        return Update({**_clean(fitted), **new}, {}, update.source)
    found = resolve(model, update)
    return Update(_clean(found.deltas), {}, found.source)


def _clean(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """By the names that parameters have without PEFT's layers around their own."""
    return {clean(name): delta for name, delta in deltas.items()}


def _from_folder(folder: Path, model: nn.Module) -> Update | None:
    """The update in a local folder of an adapter or a tuned model."""
    if (folder / "adapter_config.json").is_file():
        return from_directory(folder, model)
    if (folder / "config.json").is_file():
        return _between(model, load_model(type(model), str(folder)))
    return None


def _lacks(model: nn.Module, name: str) -> bool:
    """Whether a name is the bias of a layer that has none."""
    path, _, last = name.rpartition(".")
    found = dict(model.named_modules()).get(path)
    module = None if found is None else without_adapter(found)
    return last == "bias" and isinstance(module, nn.Linear) and module.bias is None


def _new_bias(model: nn.Module, name: str, delta: Delta) -> Tensor:
    """A bias that the base lacks, checked as `resolve` checks others."""
    layer = layer_at(model, name.rpartition(".")[0], adapted=True)
    expected = layer.shape[:1]
    if tuple(delta.shape) != expected:
        raise UpdateMismatchError(
            f"The update has `{name}` of shape {tuple(delta.shape)}; the model expects "
            f"{expected}."
        )
    return as_dense(delta).to(layer.device)


def _between(model: nn.Module, tuned: nn.Module) -> Update:
    """Tuned − base; biases that only the tuned model has start from zero."""
    before, after = dict(model.named_parameters()), dict(tuned.named_parameters())
    new = {n: torch.zeros_like(after[n]) for n in after if _lacks(model, n)}
    if not new:
        return Update.between(model, tuned)
    return Update.from_state_dicts({**before, **new}, after)


def _check_covered(update: Update, blocks: Blocks) -> None:
    """Refuse, before anything is computed, what no rule is for."""
    known = covered(blocks.architecture)
    for name in update.deltas:
        inside = name.startswith(f"{blocks.path}.")
        path = name.removeprefix(f"{blocks.path}.").partition(".")[2]
        if not inside:
            reason = "it is outside the blocks, and so before or after all sites"
            raise no_steering(name, reason)
        if path not in known:
            raise no_steering(name, _why_not(path, blocks.architecture))


def _why_not(path: str, known: Architecture) -> str:
    """Why there is no rule for a parameter of a block."""
    if "norm" in path.lower() or path.startswith("ln_"):
        return "of the norms only those that end the sum of a stream are taken (BERT)"
    if path.startswith(f"{known.attn_projection.split('.')[0]}."):
        return (
            "it acts before attention mixes the tokens, and a steer is given one token "
            "at a time"
        )
    return "no rule is for it"
