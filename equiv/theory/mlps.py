"""A model's MLPs as functions of their input, in float64, each by itself.

Symbols
    u       input of the MLP (`mlp_in`), [tokens, d]
    m       what its last linear layer reads (`mlp_hidden`), [tokens, f]
    y       its own output W_d m + b, before any norm on the way to the stream
    J, A    derivatives of m and of y with respect to u

A copy of the module is run, so that the model stays as it is. Only MLPs that are one
module with a last linear layer are found: not mixtures of experts, nor blocks that
call the layers of their MLP themselves.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jvp, vmap

from equiv.model.blocks import Blocks, submodule
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.shift.activations import Shift
from equiv.steering.weights.deltas import as_dense
from equiv.theory.judging import TOLERANCE, relative
from equiv.theory.setting import Setting
from equiv.theory.values import ClaimResult, Verdict
from equiv.update.update import Update

T = TypeVar("T")

# Layers that are looked at, evenly from the first to the last.
LAYERS = 4
NONE_FOUND = ClaimResult(
    Verdict.NOT_APPLICABLE,
    "no MLP of this model is one module that ends in a linear layer",
)


@dataclass(frozen=True)
class MLP:
    """One MLP and what an update does to it.

    Attributes:
        layer: Index of its block.
        u: Inputs in the base model, [tokens, d].
        module: A copy of the module, in float64; its last linear layer keeps what it
            was given in `seen`.
        weights: Its parameters by name.
        changes: ΔW of those that the update touches.
        last: Name of W_d among them.
        crossed: Whether W_d is stored as [f, d].
        seen: The m of the last run.
    """

    layer: int
    u: Tensor
    module: nn.Module
    weights: Mapping[str, Tensor]
    changes: Mapping[str, Tensor]
    last: str
    crossed: bool
    seen: list[Tensor]

    @property
    def down(self) -> Tensor:
        """W_d, [d, f]."""
        return self._oriented(self.weights)

    @property
    def down_change(self) -> Tensor:
        """ΔW_d, [d, f]."""
        if self.last not in self.changes:
            return torch.zeros_like(self.down)
        return self._oriented(self.changes)

    @property
    def target(self) -> Tensor:
        """What the update does to y at the same input: [tokens, d], exact."""
        return self.run(self.u, 1.0)[1] - self.run(self.u)[1]

    def run(self, u: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor]:
        """(m, y) at some inputs [tokens, d], with the update scaled."""
        moved = {n: self.weights[n] + scale * d for n, d in self.changes.items()}
        return self._call({**self.weights, **moved}, u)

    def first_order(self) -> Tensor:
        """The derivative of y along the update, at the same input: [tokens, d]."""
        if not self.changes:
            return torch.zeros_like(self.u)
        at = {name: self.weights[name] for name in self.changes}

        def output(moved: dict[str, Tensor]) -> Tensor:
            return self._call({**self.weights, **moved}, self.u)[1]

        return jvp(output, (at,), (dict(self.changes),))[1]

    def slopes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(J, A) at some inputs: [tokens, f, d] and [tokens, d, d]."""

        def one(token: Tensor) -> tuple[Tensor, Tensor]:
            m, y = self._call(self.weights, token[None])
            return m[0], y[0]

        return vmap(jacfwd(one), chunk_size=16)(u)

    def with_down(self, matrix: Tensor) -> "MLP":
        """The same with another W_d, [d, f]."""
        stored = matrix.T if self.crossed else matrix
        return replace(self, weights={**self.weights, self.last: stored})

    def cut(self, rank: int) -> "MLP":
        """The same with W_d cut to its first singular directions."""
        left, sizes, right = torch.linalg.svd(self.down, full_matrices=False)
        low = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        return self.with_down(low)

    def _call(self, weights: Mapping[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        y = functional_call(self.module, dict(weights), (u[None],))
        return self.seen.pop()[0], y[0]

    def _oriented(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[self.last].T if self.crossed else tensors[self.last]


def find_mlps(setting: Setting, tokens: int) -> list[MLP]:
    """The MLPs of some layers, at distinct inputs drawn by the setting's seed.

    Args:
        setting: Model, update and inputs.
        tokens: At most so many.
    """
    blocks = find_blocks(setting.model)
    if blocks is None:
        return []
    found = []
    with measured(setting.model):
        for layer in range(len(blocks.modules)):
            shift = setting.shifts.get((layer, "mlp_in"))
            made = None
            if shift is not None:
                made = _at(blocks, layer, setting.update, shift, tokens, setting.seed)
            if made is not None:
                found.append(made)
    return evenly(found)


def evenly(found: Sequence[T]) -> list[T]:
    """At most `LAYERS` of them, the first and the last among these.

    Example:
        >>> evenly(range(8))
        [0, 2, 5, 7]
    """
    if len(found) <= LAYERS:
        return list(found)
    step = (len(found) - 1) / (LAYERS - 1)
    return [found[round(n * step)] for n in range(LAYERS)]


def column_rank(matrix: Tensor) -> int:
    """The rank of a matrix, to rounding."""
    return int(torch.linalg.matrix_rank(matrix))


def project(matrix: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, d] on the columns of a matrix [d, f]."""
    left = torch.linalg.svd(matrix, full_matrices=False).U
    basis = left[:, : column_rank(matrix)]
    return rows @ basis @ basis.T


def _at(
    blocks: Blocks,
    layer: int,
    update: Update,
    shift: Shift,
    tokens: int,
    seed: int,
) -> MLP | None:
    known, block = blocks.known(layer), blocks.block(layer)
    module, last = submodule(block, known.mlp), known.mlp_projection
    inside = last.startswith(f"{known.mlp}.")
    if not (known.mlp and inside and module and submodule(block, last)):
        return None
    own, seen = copy.deepcopy(module).double(), []
    name = last.removeprefix(f"{known.mlp}.")
    linear = own.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    prefix = f"{blocks.name(layer)}.{known.mlp}."
    deltas = {
        full.removeprefix(prefix): as_dense(delta)
        for full, delta in update.deltas.items()
        if full.startswith(prefix)
    }
    weights = {n: p.detach() for n, p in own.named_parameters()}
    rows = shift.base[shift.mask]
    made = MLP(
        layer,
        rows[distinct(rows, tokens, seed)],
        own,
        weights,
        deltas,
        f"{name}.weight",
        type(linear).__name__ == "Conv1D",
        seen,
    )
    return made if _is_one(made) else None


def _is_one(made: MLP) -> bool:
    """Whether it runs by itself, and its output is W_d m + b."""
    if made.last not in made.weights:
        return False
    try:
        m, y = made.run(made.u)
    except (RuntimeError, TypeError, ValueError, LookupError):
        return False
    bias = made.weights.get(made.last.replace("weight", "bias"), torch.zeros(()))
    return relative(y, m @ made.down.T + bias) < TOLERANCE


def distinct(rows: Tensor, count: int, seed: int) -> Tensor:
    """Indices of at most so many drawn rows that differ from each other."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    _, group = torch.unique(rows[order], dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(rows))
    first = first.scatter_reduce(0, group, torch.arange(len(rows)), "amin")
    return order[first.sort().values[:count]]
