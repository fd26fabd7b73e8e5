"""Outputs of a side on rows of token ids, and how far two of them are apart.

Rows are run in groups of one length, so that nothing is padded and a function from
token ids to outputs needs no mask. Where a model has no logits, its last hidden state
stands for them. Logits are compared less their mean over the
vocabulary: a constant added to all of them changes no prediction, and log-probabilities
are logits less such a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.errors import ArgumentError, OutputsError
from equiv.gate.sides import Side, TopK
from equiv.model.batches import Batch
from equiv.model.guard import kept, measured
from equiv.model.precision import arithmetic
from equiv.model.sites import model_output
from equiv.steering.applying.apply import steer

# Logits in one group of rows; a diagnosis holds as many tensors of them as an update
# has parts, in float64.
GROUP_LOGITS = 2**22


@dataclass(frozen=True)
class Group:
    """Rows of one length: token ids [batch, seq], and their places among all rows."""

    ids: Tensor
    index: tuple[int, ...]


def rows_of(batches: Sequence[Batch], vocabulary: int | None) -> list[Group]:
    """The rows of token ids in batches, without padding, by length.

    Groups are small enough for the logits of each, at every part of an update, to stand
    in memory together.

    Raises:
        ArgumentError: If the inputs are no token ids.
    """
    rows: dict[int, list[tuple[int, Tensor]]] = {}
    for batch in batches:
        if batch.source is not None:
            raise ArgumentError(
                "Expected a model that reads one text where outputs are compared, got "
                "inputs of an encoder–decoder. Its weights are compared without "
                "`inputs`, its activations by `equiv.check`."
            )
        ids = batch.arguments.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ArgumentError(
                "Expected `inputs` to be token ids (or texts) where outputs are "
                f"compared, got {sorted(n or 'features' for n in batch.arguments)}."
            )
        for i, n in enumerate(batch.index):
            row = ids[i][batch.mask[i]]
            rows.setdefault(len(row), []).append((n, row))
    groups = []
    for length, found in sorted(rows.items()):
        step = max(1, GROUP_LOGITS // (length * (vocabulary or 1)))
        for start in range(0, len(found), step):
            part = found[start : start + step]
            ids = torch.stack([row for _, row in part])
            groups.append(Group(ids, tuple(n for n, _ in part)))
    return groups


def vocabulary_of(model: nn.Module) -> int | None:
    """Logits per token, where the configuration says so."""
    return getattr(getattr(model, "config", None), "vocab_size", None)


def as_batches(groups: Sequence[Group]) -> list[Batch]:
    """The groups as batches for the engine."""
    return [
        Batch(
            {"input_ids": group.ids, "use_cache": False},
            torch.ones_like(group.ids, dtype=torch.bool),
            index=group.index,
        )
        for group in groups
    ]


def exact(side: Side, groups: Sequence[Group]) -> list[Tensor]:
    """Logits of the base with its update (or steering) in float64, [batch, seq, v]."""
    return _run(side, groups, torch.float64)


def stored(side: Side, groups: Sequence[Group], dtype: torch.dtype) -> list[Tensor]:
    """Logits with the weights rounded to a dtype, and computed in it."""
    return [logits.double() for logits in _run(side, groups, dtype)]


def _run(side: Side, groups: Sequence[Group], dtype: torch.dtype) -> list[Tensor]:
    model = side.model
    assert model is not None
    tensors = side.tensors(dtype)
    tensors |= {
        name: buffer.to(dtype) if buffer.is_floating_point() else buffer.clone()
        for name, buffer in model.named_buffers()
    }
    found = []
    with measured(model), arithmetic(dtype), steer(model, side.steering or {}):
        for group in groups:
            call = {"input_ids": group.ids.to(_device(model)), "use_cache": False}
            with kept(model):
                out: Any = functional_call(model, tensors, (), call)
            found.append(_checked(model_output(out), group, side))
    return found


def answered(side: Side, group: Group) -> Tensor | TopK:
    """What the side itself says: logits [batch, seq, vocab], or the likeliest tokens.

    Raises:
        OutputsError: If it answers with anything else, or with what is not finite.
    """
    if side.ask is not None:
        with torch.no_grad():
            found = side.ask(group.ids)
        return _topk(found, group, side) or _checked(found, group, side)
    model = side.model
    assert model is not None
    if side.update is not None:
        assert side.dtype is not None
        return stored(side, [group], side.dtype)[0]
    with measured(model), steer(model, side.steering or {}):
        call = {"input_ids": group.ids.to(_device(model)), "use_cache": False}
        out: Any = model(**call)
    return _checked(model_output(out), group, side)


def centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the vocabulary, in float64."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def pair(actual: Tensor | TopK, expected: Tensor | TopK) -> tuple[Tensor, Tensor]:
    """The two in one form, [batch, seq, features], in float64.

    Against the likeliest tokens of one side stand the same tokens' log-probabilities of
    the other.

    Raises:
        OutputsError: If the vocabularies differ, or two lists of likeliest tokens do.
    """
    if isinstance(actual, TopK) and isinstance(expected, TopK):
        if not torch.equal(actual.ids, expected.ids):
            raise OutputsError(
                "Both sides give the log-probabilities of their likeliest tokens only, "
                "and these are not the same tokens. Expected at least one side with "
                "logits for the whole vocabulary."
            )
        return actual.log_probs.double(), expected.log_probs.double()
    if isinstance(actual, TopK):
        assert isinstance(expected, Tensor)
        return actual.log_probs.double(), picked(expected, actual.ids)
    if isinstance(expected, TopK):
        return picked(actual, expected.ids), expected.log_probs.double()
    if actual.shape[-1] != expected.shape[-1]:
        raise OutputsError(
            f"The two sides have different vocabularies: {actual.shape[-1]} and "
            f"{expected.shape[-1]} logits per token."
        )
    return centred(actual), centred(expected).to(actual.device)


def picked(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens, in float64."""
    if int(ids.max()) >= logits.shape[-1]:
        raise OutputsError(
            f"A likeliest token has id {int(ids.max())}, beyond the {logits.shape[-1]} "
            "logits of the other side: the vocabularies differ."
        )
    return torch.log_softmax(logits.double(), -1).gather(-1, ids.to(logits.device))


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    """‖actual − expected‖ / ‖expected‖ per token, [batch, seq]."""
    size = torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-300)
    return torch.linalg.vector_norm(actual - expected, dim=-1) / size


def _topk(found: object, group: Group, side: Side) -> TopK | None:
    if isinstance(found, tuple) and len(found) == 2:
        found = TopK(*found)
    if not isinstance(found, TopK):
        return None
    for part in (found.ids, found.log_probs):
        if not isinstance(part, Tensor):
            raise OutputsError(
                f"{side.name}: expected a tensor of logits, or two tensors of token "
                f"ids and log-probabilities, got {type(part).__name__}."
            )
    if found.ids.is_floating_point() or bool((found.ids < 0).any()):
        raise OutputsError(
            f"{side.name}: expected token ids, integers from 0, beside the "
            f"log-probabilities, got {found.ids.dtype} from {found.ids.min().item()}."
        )
    lead = tuple(group.ids.shape)
    if found.ids.shape[:2] != lead or found.ids.shape != found.log_probs.shape:
        raise OutputsError(
            f"{side.name}: expected ids and log-probabilities of shape [{lead[0]}, "
            f"{lead[1]}, k], got {tuple(found.ids.shape)} and "
            f"{tuple(found.log_probs.shape)}."
        )
    _check_finite(found.log_probs, side)
    if float(found.log_probs.max()) > 1e-3:
        raise OutputsError(
            f"{side.name}: expected natural log-probabilities, which are not above 0, "
            f"got {float(found.log_probs.max()):.3g}."
        )
    return found


def _checked(logits: object, group: Group, side: Side) -> Tensor:
    lead = tuple(group.ids.shape)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != lead:
        got = (
            tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise OutputsError(
            f"{side.name}: expected logits of shape [{lead[0]}, {lead[1]}, vocab] for "
            f"token ids of shape {list(lead)}, got {got}."
        )
    _check_finite(logits, side)
    return logits


def _check_finite(values: Tensor, side: Side) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise OutputsError(
            f"{side.name}: {int(bad.sum())} outputs are NaN or infinite, the first for "
            f"sequence {where[0]}, position {where[1]}."
        )


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters())
