"""One gradient step's shift against the vector of labelled contrasts.

The behaviour is a high answer, 5 to 9. The step is plain SGD on all weights, on the
mean log-odds of a high answer; its shift is taken to first order, so the rate drops out
of every cosine. The vector is the difference of mean activations between expressions
whose answer is high and those whose answer is low (CAA), from other expressions. Both
are at the last token, at every block's output.

What a cosine between the two is by chance depends on how unevenly activations spread,
which 1/√d leaves out: labels are permuted many times, and the step compared with the
vectors of those.
"""

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from equiv.demo.train import IDS
from equiv.shift.activations import shifts
from equiv.tasks.listops import generate
from equiv.theory.trained.adapting import Asked, asked
from equiv.theory.values import Value

PERMUTATIONS = 1000
QUANTILE = 0.95
# Length of the update that is measured; first-order shifts are proportional to it.
LENGTH = 1e-3
LOW, HIGH = ([IDS[str(n)] for n in digits] for digits in (range(5), range(5, 10)))


def gradient_step(
    base: Any, operators: Sequence[str], count: int, seed: int
) -> dict[str, Value]:
    """Cosines per layer, on twice `count` expressions, half for each side.

    Returns:
        "cosine" of the step's mean shift with the vector; "by chance", what 95 % of
        permuted labels stay below; "share reached", of permutations at or above it.
    """
    source = generate(operators, seed)
    stepped, labelled = (asked(islice(source, count)) for _ in range(2))
    update = step(base, stepped)
    both = _joined(stepped, labelled)
    found = shifts(base, update, both, sites=["block_out"], dtype=torch.float64)
    high = torch.isin(labelled.answers(labelled.targets), torch.tensor(HIGH))
    draw = torch.Generator().manual_seed(seed)
    cosines: dict[str, list[float]] = {"cosine": [], "by chance": [], "share": []}
    for own in found:
        shift = stepped.answers(own.first_order[:count]).mean(0)
        states = labelled.answers(own.base[count:])
        cosine = _cosines(shift, contrast(states, high[None]))
        permuted = _cosines(shift, contrast(states, permutations(high, draw)))
        cosines["cosine"].append(float(cosine))
        cosines["by chance"].append(float(permuted.quantile(QUANTILE)))
        cosines["share"].append(float((permuted >= cosine).double().mean()))
    return cosines


def step(base: nn.Module, batch: Asked) -> dict[str, Tensor]:
    """The gradient of the mean log-odds of a high answer, of length `LENGTH`."""
    model = copy.deepcopy(base).requires_grad_(True)
    answers = batch.answers(model(**batch.inputs).logits)
    odds = answers[:, HIGH].logsumexp(1) - answers[:, LOW].logsumexp(1)
    odds.mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    size = torch.stack([grad.norm() for grad in found.values()]).norm()
    return {name: grad * (LENGTH / size) for name, grad in found.items()}


def contrast(states: Tensor, labels: Tensor) -> Tensor:
    """Differences of means, [sets of labels, d].

    Args:
        states: [n, d].
        labels: Bool [sets, n].
    """
    labels = labels.to(states.dtype)
    weights = labels / labels.sum(1, keepdim=True)
    weights = weights - (1 - labels) / (1 - labels).sum(1, keepdim=True)
    return weights @ states


def permutations(labels: Tensor, draw: torch.Generator) -> Tensor:
    """The labels in other orders, [PERMUTATIONS, n]."""
    orders = torch.rand(PERMUTATIONS, len(labels), generator=draw).argsort(1)
    return labels[orders]


def _cosines(one: Tensor, many: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one[None], many)


def _joined(first: Asked, second: Asked) -> dict[str, Tensor]:
    return {k: torch.cat([v, second.inputs[k]]) for k, v in first.inputs.items()}
