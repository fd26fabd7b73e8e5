"""Inputs in the one form that everything below uses: a list of small batches.

A batch is a mapping of keyword arguments for the model, a mask of the tokens that
count, and whether its sequences are held out from fits. Sequences are never split;
each batch holds sequences of one length, so nothing is padded here that the caller
did not pad.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from equiv.errors import InputsError
from equiv.model.families import model_type

# Tokens in one micro-batch: large enough to fill two cores, small enough that the
# activations of a block stay in the tens of megabytes.
MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of one forward pass.

    Attributes:
        arguments: What the model is called with (positional for a plain module).
        mask: Tokens that count, bool [batch, seq], or [batch] for a plain module.
        labels: Per output position, what it should predict (−100 for nothing), if the
            caller gave labels; never passed to the model.
        held_out: Whether fits must not see these sequences.
        index: Which of the caller's sequences these are, from 0.
    """

    arguments: Mapping[str, Any]
    mask: Tensor
    labels: Tensor | None = None
    held_out: bool = False
    index: tuple[int, ...] = ()

    @property
    def sequences(self) -> int:
        """Number of sequences (rows of the batch axis)."""
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.mask.sum())

    def select(self, rows: Sequence[int]) -> "Batch":
        """The batch with only some of its sequences."""
        n, keep = self.sequences, torch.tensor(list(rows), device=self.mask.device)

        def pick(value: Any) -> Any:
            shared = not isinstance(value, Tensor) or value.ndim == 0
            return value if shared or value.shape[0] != n else value[keep]

        return replace(
            self,
            arguments={name: pick(value) for name, value in self.arguments.items()},
            mask=self.mask[keep],
            labels=None if self.labels is None else pick(self.labels),
            index=tuple(self.index[row] for row in rows),
        )


POSITIONAL = ""  # the key under which a plain module's only argument is kept


def first_unmasked(mask: Tensor) -> Tensor:
    """True at the first token that counts in each sequence, bool like `mask`."""
    if mask.ndim < 2:
        return torch.zeros_like(mask)
    return mask & (mask.cumsum(dim=1) == 1)


def from_inputs(
    model: nn.Module,
    inputs: object,
    tokenizer: Any = None,
    *,
    keep_empty: bool = False,
) -> list[Batch]:
    """Turn whatever the caller has into batches.

    Args:
        model: The model they are for (its dtype, device, vocabulary and width).
        inputs: A string or list of strings (with `tokenizer`), a tensor of token ids
            [batch, seq] or features, a mapping of keyword arguments, or an iterable
            of tensors or mappings such as a `DataLoader`.
        tokenizer: A Hugging Face tokenizer; needed for texts.
        keep_empty: Whether sequences without any token that counts stay.

    Raises:
        InputsError: If the inputs are of no such kind, cannot be fed to the model, or
            leave no token to measure.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str):
        made = _from_texts(model, inputs, tokenizer)
    else:
        made = _numbered(_batches(model, inputs))
    batches = [_checked(model, batch) for batch in made]
    if not batches:
        raise InputsError("Expected at least one batch of inputs, got none.")
    if not any(batch.tokens for batch in batches):
        raise InputsError(
            "Every token is masked: the attention mask is 0 everywhere, so there is "
            "nothing to measure. Expected at least one token with mask 1."
        )
    return [piece for batch in batches for piece in _pieces(batch, keep_empty)]


def _batches(model: nn.Module, inputs: object) -> Iterable[Batch]:
    if isinstance(inputs, Tensor):
        yield _from_tensor(model, inputs)
    elif isinstance(inputs, Mapping):
        yield _from_mapping(model, inputs)
    elif isinstance(inputs, Iterable):
        for entry in inputs:
            if isinstance(entry, Tensor):
                yield _from_tensor(model, entry)
            elif isinstance(entry, Mapping):
                yield _from_mapping(model, entry)
            elif isinstance(entry, (tuple, list)) and isinstance(entry[0], Tensor):
                yield _from_tensor(model, entry[0])
            else:
                raise InputsError(
                    "Expected tensors or mappings of keyword arguments in `inputs`, "
                    f"got {type(entry).__name__}."
                )
    else:
        raise InputsError(
            'Expected `inputs` to be None, "samples", texts, a tensor, a mapping of '
            f"keyword arguments, or an iterable of those, got {type(inputs).__name__}."
        )


def _from_texts(model: nn.Module, texts: Sequence[str], tokenizer: Any) -> list[Batch]:
    if model_type(model) is None:
        raise InputsError(
            f"Texts need a Hugging Face model, got {type(model).__name__}: pass "
            "tensors."
        )
    if tokenizer is None:
        raise InputsError(
            "Expected `tokenizer=` beside texts, got None. Pass the model's tokenizer, "
            "for example `AutoTokenizer.from_pretrained(...)`."
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    ids = [
        tokenizer(text, truncation=limit is not None, max_length=limit).input_ids
        for text in texts
    ]
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return [
        replace(
            _from_mapping(model, _padded([rows[i] for i in chunk], pad)),
            index=tuple(chunk),
        )
        for chunk in _similar([len(row) for row in rows])
    ]


def _similar(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Rows in order of length, in chunks that fit a micro-batch once padded."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i])
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) + 1) * lengths[i] > MICRO_BATCH_TOKENS:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _padded(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Rows padded on the right to one length, and the mask that says so."""
    ones = [torch.ones_like(row) for row in rows]
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": stack(list(rows), batch_first=True, padding_value=pad),
        "attention_mask": stack(ones, batch_first=True),
    }


def _from_tensor(model: nn.Module, tensor: Tensor) -> Batch:
    if model_type(model) is None:
        return _from_mapping(model, {POSITIONAL: tensor})
    name = "inputs_embeds" if tensor.is_floating_point() else "input_ids"
    return _from_mapping(model, {name: tensor})


def _from_mapping(model: nn.Module, mapping: Mapping[str, Any]) -> Batch:
    arguments = dict(mapping)
    labels = arguments.pop("labels", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    main = next((v for v in arguments.values() if isinstance(v, Tensor)), None)
    if main is None:
        raise InputsError(f"Expected a tensor in the inputs, got {sorted(mapping)}.")
    hf = model_type(model) is not None
    axes = 2 if hf else 1
    if main.ndim < axes:
        raise InputsError(
            f"Expected inputs with a batch axis{' and a seq axis' if hf else ''}, got "
            f"shape {tuple(main.shape)}."
        )
    if hf:
        arguments.setdefault("use_cache", False)
    given = arguments.get("attention_mask")
    mask = (
        given.bool()
        if isinstance(given, Tensor) and given.ndim == 2
        else torch.ones(main.shape[:axes], dtype=torch.bool, device=device)
    )
    if isinstance(labels, Tensor):
        labels = _aligned(model, labels.to(device), mask)
    return Batch(arguments, mask, labels, index=tuple(range(main.shape[0])))


def _aligned(model: nn.Module, labels: Tensor, mask: Tensor) -> Tensor:
    """Labels where the prediction stands: a causal model predicts the next token.

    Labels under the mask are dropped, so that padding enters no figure.
    """
    if labels.shape != mask.shape or labels.ndim < 2:
        return labels
    labels = labels.masked_fill(~mask, -100)
    if getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification"):
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _checked(model: nn.Module, batch: Batch) -> Batch:
    ids = batch.arguments.get("input_ids")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(ids, Tensor) and size is not None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise InputsError(
                f"Expected token ids in 0…{size - 1} (the model's vocabulary), got ids "
                f"in {low}…{high}. Is this the model's own tokenizer?"
            )
    return batch


def _pieces(batch: Batch, keep_empty: bool) -> Iterable[Batch]:
    """Micro-batches, with or without the sequences of which no token counts."""
    rows = [
        r for r in range(batch.sequences) if keep_empty or bool(batch.mask[r].any())
    ]
    per_sequence = max(1, batch.mask[0].numel())
    step = max(1, MICRO_BATCH_TOKENS // per_sequence)
    for start in range(0, len(rows), step):
        yield batch.select(rows[start : start + step])


def _numbered(batches: Iterable[Batch]) -> list[Batch]:
    """Batches with their sequences counted through."""
    numbered, count = [], 0
    for batch in batches:
        index = tuple(range(count, count + batch.sequences))
        numbered.append(replace(batch, index=index))
        count += batch.sequences
    return numbered


def split(batches: Sequence[Batch], share: float, seed: int) -> list[Batch]:
    """Mark a share of the sequences as held out, drawn by `seed`.

    With fewer than two sequences nothing can be held out and none is.
    """
    everything = sorted(n for batch in batches for n in batch.index)
    if len(everything) < 2:
        return list(batches)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everything), generator=generator).tolist()
    count = max(1, round(share * len(everything)))
    held = {everything[i] for i in order[:count]}
    parts = []
    for batch in batches:
        for flag in (False, True):
            rows = [i for i, n in enumerate(batch.index) if (n in held) == flag]
            if rows:
                parts.append(replace(batch.select(rows), held_out=flag))
    return parts


def at_most(batches: Sequence[Batch], tokens: int, seed: int) -> list[Batch]:
    """Sequences drawn by `seed` that together have at most `tokens` tokens.

    Drawn, because batches of texts come in the order of their length. There is always
    one sequence at least.
    """
    counts = {
        n: int(batch.mask[row].sum())
        for batch in batches
        for row, n in enumerate(batch.index)
    }
    everything = sorted(counts)
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    room = tokens
    for i in torch.randperm(len(everything), generator=generator).tolist():
        n = everything[i]
        if counts[n] <= room or not chosen:
            chosen.add(n)
            room -= counts[n]
    picked = [
        (batch, [row for row, n in enumerate(batch.index) if n in chosen])
        for batch in batches
    ]
    return [batch.select(rows) for batch, rows in picked if rows]
