"""How far a model's output is from the tuned model's, token by token.

With logits z: KL(softmax z_tuned ‖ softmax z) per token in nats, whether the top token
is the same, and the loss where there are labels. Without logits (encoders, plain
modules): ‖o_tuned − o‖² per token, and cosine.
Everything is summed in float64; tokens outside the mask enter no figure.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from equiv.shift.measures import has_tokens

# Rows of logits turned into float64 at a time: bounds memory at large vocabularies.
ROWS = 256


@dataclass
class Distances:
    """Figures of one steered model against the tuned model, over held-out tokens.

    Attributes:
        per_token: KL, or squared difference, of each token.
        sequence: Which sequence each token belongs to.
    """

    has_logits: bool
    per_token: list[np.ndarray] = field(default_factory=list)
    sequence: list[np.ndarray] = field(default_factory=list)
    same_top: int = 0
    tokens: int = 0
    tuned_square: float = 0.0
    square: float = 0.0
    product: float = 0.0
    loss: float = 0.0
    loss_tuned: float = 0.0
    labelled: int = 0
    sequences: int = 0

    def add(
        self, tuned: Tensor, output: Tensor, mask: Tensor, labels: Tensor | None
    ) -> None:
        """Add one batch of outputs [batch, seq, vocab or d], or [batch, *features]."""
        if mask.ndim == 1:  # rows of a plain module, whatever axes they have
            tuned, output = tuned.flatten(1), output.flatten(1)
        elif not has_tokens(tuned, mask):  # pooled: one row per sequence
            mask = torch.ones(tuned.shape[:1], dtype=torch.bool, device=tuned.device)
            tuned, output = tuned.flatten(1), output.flatten(1)
        owner = torch.arange(len(mask), device=mask.device) + self.sequences
        owner = owner.reshape(-1, *[1] * (mask.ndim - 1)).expand_as(mask)[mask]
        self.sequences += len(mask)
        self.sequence.append(owner.cpu().numpy())
        for rows in torch.split(torch.nonzero(mask), ROWS):
            index = tuple(rows.T)
            self._add_rows(tuned[index].double(), output[index].double())
        if labels is not None and self.has_logits and _are_classes(labels, output):
            labels = labels.to(output.device)
            self.loss += _summed_loss(output, labels)
            self.loss_tuned += _summed_loss(tuned, labels)
            self.labelled += int((labels != -100).sum())

    def _add_rows(self, tuned: Tensor, output: Tensor) -> None:
        self.tokens += len(tuned)
        if self.has_logits:
            kl, same = kl_divergence(tuned, output)
            self.same_top += int(same.sum())
        else:
            kl = (tuned - output).square().sum(-1)
            self.product += float((tuned * output).sum())
            self.square += float(output.square().sum())
            self.tuned_square += float(tuned.square().sum())
        self.per_token.append(kl.cpu().numpy())

    @property
    def tokens_flat(self) -> np.ndarray:
        """All per-token figures in one array."""
        return np.concatenate(self.per_token) if self.per_token else np.zeros(0)

    @property
    def mean(self) -> float:
        """Mean KL per token, or the squared relative difference of the output."""
        values = self.tokens_flat
        if not len(values):
            return 0.0
        if self.has_logits:
            return float(values.mean())
        return float(values.sum()) / self.tuned_square if self.tuned_square else 0.0

    @property
    def per_sequence(self) -> np.ndarray:
        """Sum over the tokens of each sequence, [sequences]."""
        owner = np.concatenate(self.sequence)
        return np.bincount(owner, self.tokens_flat, minlength=self.sequences)

    @property
    def cosine(self) -> float | None:
        """Cosine of the whole output with the tuned one; `None` with logits."""
        size = (self.square * self.tuned_square) ** 0.5
        return self.product / size if size else None


def kl_divergence(tuned: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax tuned ‖ softmax output) per row in nats, and whether the top agrees.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
        >>> kl, same = kl_divergence(z, torch.log(torch.tensor([[0.25, 0.75]])))
        >>> round(float(kl), 4)  # ½ ln(½/¼) + ½ ln(½/¾)
        0.1438
    """
    p, q = torch.log_softmax(tuned, -1), torch.log_softmax(output, -1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return kl, tuned.argmax(-1) == output.argmax(-1)


def _are_classes(labels: Tensor, output: Tensor) -> bool:
    """Whether the labels name one class per row of logits."""
    return not labels.is_floating_point() and labels.shape == output.shape[:-1]


def _summed_loss(output: Tensor, labels: Tensor) -> float:
    """Cross-entropy summed over the labels; -100 is no label."""
    rows = output.reshape(-1, output.shape[-1]).split(ROWS)
    return sum(
        float(
            torch.nn.functional.cross_entropy(
                part.double(), wanted, ignore_index=-100, reduction="sum"
            )
        )
        for part, wanted in zip(rows, labels.reshape(-1).split(ROWS), strict=True)
    )


def recovered(steered: Distances, unsteered: Distances) -> float | None:
    """1 − distance / distance of the unsteered model; `None` when that is zero."""
    return 1 - steered.mean / unsteered.mean if unsteered.mean else None


def interval(
    steered: Distances, unsteered: Distances, seed: int
) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of `recovered` over sequences, drawn in pairs.

    `None` with fewer than two sequences, or when one sequence carries everything, so
    that resamples without it have nothing to recover.
    """
    from scipy.stats import bootstrap

    pair = steered.per_sequence, unsteered.per_sequence
    if len(pair[0]) < 2 or not unsteered.mean:
        return None, None

    def statistic(s: np.ndarray, u: np.ndarray, axis: int = -1) -> np.ndarray:
        return 1 - s.sum(axis=axis) / u.sum(axis=axis)

    with np.errstate(divide="ignore", invalid="ignore"):
        result = bootstrap(
            pair,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():
        return None, None
    return float(low), float(high)
