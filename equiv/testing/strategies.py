"""Hypothesis strategies: small models, updates of them, and inputs for them.

Everything is drawn as a few integers and made from them, so examples shrink and their
`repr` tells how to make them again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from equiv.testing.models import FAMILIES, SMOOTH, VOCABULARY, mlp, transformer
from equiv.update.update import Update


@dataclass(frozen=True)
class Case:
    """A model with an update and inputs that fit it.

    Attributes:
        recipe: How to make it again, for messages.
        model: In float64 and eval mode.
        update: Over all parameters, or some.
        inputs: Features [batch, d] or token ids [batch, seq].
    """

    recipe: str
    model: nn.Module
    update: Update
    inputs: Tensor

    def __repr__(self) -> str:
        return self.recipe


def seeds() -> st.SearchStrategy[int]:
    """Seeds for anything that is drawn."""
    return st.integers(0, 2**16)


@st.composite
def mlp_cases(
    draw: Any,
    activations: tuple[str, ...] = tuple(SMOOTH),
    relative_norms: tuple[float, ...] = (0.01, 0.1, 0.5),
) -> Case:
    """Multilayer perceptrons of one to three linear layers."""
    widths = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    activation = draw(st.sampled_from(activations))
    seed = draw(seeds())
    size = draw(st.sampled_from(relative_norms))
    model = mlp(widths, activation, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (draw(st.integers(1, 5)), widths[0])
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    recipe = (
        f"mlp({widths}, {activation!r}, seed={seed}), relative norm {size}, "
        f"inputs {tuple(shape)}"
    )
    return Case(recipe, model, Update.random(model, size, seed=seed), inputs)


@st.composite
def transformer_cases(
    draw: Any,
    families: tuple[str, ...] = FAMILIES,
    relative_norms: tuple[float, ...] = (0.01, 0.1),
) -> Case:
    """Tiny transformers of every family, with an update of all their parameters."""
    family = draw(st.sampled_from(families))
    seed = draw(seeds())
    size = draw(st.sampled_from(relative_norms))
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 6)))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(VOCABULARY, shape, generator=generator)
    model = transformer(family, seed=seed)
    recipe = f"transformer({family!r}, seed={seed}), relative norm {size}, ids {shape}"
    return Case(recipe, model, Update.random(model, size, seed=seed), inputs)
