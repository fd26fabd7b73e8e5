"""The one form of inputs that everything below uses: a list of small batches.

A batch is a mapping of keyword arguments for the model, a mask of the tokens that
count, and whether its sequences are held out from fits. Sequences are never split
(`at_most` cuts long ones); each batch holds sequences of one length, so nothing is
padded that the caller did not pad.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Tokens in one micro-batch: large enough to fill two cores, small enough that the
# activations of a block stay in the tens of megabytes.
MICRO_BATCH_TOKENS = 2048
# Logits in one micro-batch: a few points of the update keep theirs side by side, a
# quarter of a gigabyte each in float32.
MICRO_BATCH_LOGITS = 2**25
POSITIONAL = ""  # the key under which a plain module's only argument is kept
MAIN = ("input_ids", "inputs_embeds")  # what a Hugging Face model reads


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
        source: Tokens that count of what an encoder before a decoder reads, bool
            [batch, source]; `mask` is then of the decoder's.
    """

    arguments: Mapping[str, Any]
    mask: Tensor
    labels: Tensor | None = None
    held_out: bool = False
    index: tuple[int, ...] = ()
    source: Tensor | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences (rows of the batch axis)."""
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens that count, an encoder's too."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """The same for each sequence."""
        masks = [self.mask] if self.source is None else [self.mask, self.source]
        each = [mask.flatten(1).sum(1) if mask.ndim > 1 else mask for mask in masks]
        return tuple(int(n) for n in torch.stack(each).sum(0))

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
            source=None if self.source is None else self.source[keep],
            index=tuple(self.index[row] for row in rows),
        )


def first_unmasked(mask: Tensor) -> Tensor:
    """True at the first token that counts in each sequence, bool like `mask`."""
    if mask.ndim < 2:
        return torch.zeros_like(mask)
    return mask & (mask.cumsum(dim=1) == 1)


def room_for(model: nn.Module) -> int:
    """Tokens that a micro-batch may have."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return min(MICRO_BATCH_TOKENS, max(1, MICRO_BATCH_LOGITS // vocabulary))


def similar(lengths: Sequence[int], room: int) -> Iterable[list[int]]:
    """Rows in order of length, in chunks that fit a micro-batch once padded."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i])
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) + 1) * lengths[i] > room:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def pieces(batch: Batch, keep_empty: bool, room: int) -> Iterable[Batch]:
    """Micro-batches, with or without the sequences of which no token counts."""
    rows = [
        r for r in range(batch.sequences) if keep_empty or bool(batch.mask[r].any())
    ]
    read = 0 if batch.source is None else batch.source.shape[1]
    per_sequence = max(1, batch.mask[0].numel() + read)
    step = max(1, room // per_sequence)
    for start in range(0, len(rows), step):
        yield batch.select(rows[start : start + step])


def numbered(batches: Iterable[Batch]) -> list[Batch]:
    """Batches with their sequences counted through."""
    made, count = [], 0
    for batch in batches:
        index = tuple(range(count, count + batch.sequences))
        made.append(replace(batch, index=index))
        count += batch.sequences
    return made


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
    one sequence at least; where it alone has more tokens, and where padding makes a
    batch longer, only `tokens` columns are kept, from the first with a token. What an
    encoder before a decoder reads stays whole.
    """
    counts = {
        n: count
        for batch in batches
        for n, count in zip(batch.index, batch.counts, strict=True)
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
    return [_cut(batch.select(rows), tokens) for batch, rows in picked if rows]


def _cut(batch: Batch, tokens: int) -> Batch:
    """At most `tokens` columns of a Hugging Face batch, and the rows that have any."""
    length = batch.mask.shape[1] if batch.mask.ndim == 2 else 0
    decodes = batch.source is not None
    known = decodes or any(name in batch.arguments for name in MAIN)
    if length <= tokens or not known:
        return batch
    start = int(batch.mask.any(dim=0).int().argmax())
    columns = slice(start, start + tokens)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.ndim == 4 and value.shape[2:] == (length, length):
            return value[:, :, columns, columns]
        return value[:, columns] if value.shape[1] == length else value

    kept = replace(
        batch,
        arguments={
            name: value if decodes and not name.startswith("decoder_") else cut(value)
            for name, value in batch.arguments.items()
        },
        mask=cut(batch.mask),
        labels=cut(batch.labels),
    )
    return kept.select([r for r in range(kept.sequences) if bool(kept.mask[r].any())])
