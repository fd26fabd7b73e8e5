"""The result of a check as plain values: floats, strings and tuples, no tensors.

Every figure that a rendering shows stands here first. `None` means "not measured" or
"not applicable"; the neighbouring `verdict`, `reason` or `note` says which and why.
Relative remainders, misfits and shares are fractions, not percent. KL is in nats per
unmasked token. Norms are Frobenius norms over unmasked tokens.
"""

import math
from dataclasses import dataclass

from equiv.behaviour.spectra import Spectrum
from equiv.model.sites import Site
from equiv.shift.contributions import Contributions
from equiv.shift.results import (
    Order,
    Radius,
    Scope,
    Superposition,
    TaylorPoint,
    Verdict,
)

__all__ = [
    "Behaviour",
    "Contributions",
    "Coverage",
    "FirstPosition",
    "FitRow",
    "Order",
    "Radius",
    "Rest",
    "Routing",
    "Row",
    "Scope",
    "Spectrum",
    "Subject",
    "Superposition",
    "TaylorPoint",
    "Unflipped",
    "Verdict",
]


@dataclass(frozen=True)
class Rest:
    """A row's figures without the first position of each sequence.

    Radii are measured at propagated rows where a remainder is more than a tenth away
    from that over all positions; elsewhere they are `None`, and the row's stand.
    """

    tokens: int
    norm_base: float
    norm_exact: float
    remainder: float | None
    remainder_midpoint: float | None
    radius: Radius | None = None
    radius_midpoint: Radius | None = None


@dataclass(frozen=True)
class Unflipped:
    """A row's figures over the tokens whose experts stay, here and at layers below.

    At full size and in the radii those whose experts the full update leaves; in the
    orders those whose experts no scale of the Taylor test changes. They may attend to
    tokens of which neither is true. Radii are measured as in `Rest`.
    """

    tokens: int
    norm_base: float
    norm_exact: float
    remainder: float | None
    remainder_midpoint: float | None
    order: Order | None  # `None` where no such token is among those of the orders
    order_midpoint: Order | None
    radius: Radius | None = None
    radius_midpoint: Radius | None = None


@dataclass(frozen=True)
class Routing:
    """The tokens that the full update sends to other experts, at one mixture of them.

    Compared are the sets of experts that the base and the tuned model choose, each on
    its own stream (propagated), whatever their order and weights.
    """

    layer: int
    tokens: int  # that count
    flipped: float  # share whose experts change here
    flipped_so_far: float  # share whose experts change here or at a layer below


@dataclass(frozen=True)
class FirstPosition:
    """How large the base stream after a layer is at first positions, and elsewhere.

    Both are mean norms per token that counts; `sink` says whether the first is so much
    larger that fits leave it out.
    """

    layer: int
    norm_first: float
    norm_rest: float
    sink: bool

    @property
    def times(self) -> float:
        """How many times as large it is at first positions."""
        return self.norm_first / self.norm_rest if self.norm_rest else math.inf


@dataclass(frozen=True)
class Row:
    """First-order equivalence at one (layer, site, scope).

    `remainder` is the relative remainder at full size (t = 1) of the derivative at
    the base, `remainder_midpoint` of the derivative at W + ΔW/2. `rest` has these
    without first positions; `None` where there are no others, or no positions.
    `unflipped` has it without tokens that change experts; `None` in local rows, and
    where no layer up to here is a mixture of experts or no token keeps its own.
    """

    layer: int
    site: str
    scope: Scope
    tokens: int
    dtype: str
    derivative: str
    norm_base: float
    norm_exact: float
    norm_first_order: float | None
    remainder: float | None
    remainder_midpoint: float | None
    cosine: float | None
    cosine_midpoint: float | None
    order: Order
    order_midpoint: Order | None
    radius: Radius | None
    radius_midpoint: Radius | None
    taylor: tuple[TaylorPoint, ...] = ()
    taylor_floor: float | None = None
    taylor_dtype: str | None = None
    rest: Rest | None = None
    unflipped: Unflipped | None = None


@dataclass(frozen=True)
class Coverage:
    """The four ratios that texts call "coverage", each under its own name."""

    layer: int
    scope: Scope
    shift_mlp_over_block: float | None  # ‖δMLP‖ / ‖δblock‖
    shift_mlp_share: float | None  # ‖δMLP‖ / (‖δMLP‖ + ‖δskip‖)
    activation_mlp_share: float | None  # ‖MLP‖ / (‖MLP‖ + ‖Attn‖)
    activation_mlp_over_block: float | None  # ‖MLP‖ / ‖block‖


@dataclass(frozen=True)
class FitRow:
    """How well one form of steering, fitted in closed form, matches the shift.

    Misfits are shares of the target's squared norm left over: 0 is perfect, 1 is no
    better than no steering; above 1 on held-out sequences it is worse than none.
    """

    layer: int
    reads: str
    writes: str
    form: str
    rank: int | None  # None for a vector
    target: str
    num_parameters: int
    ridge: float
    misfit: float | None
    misfit_held_out: float | None
    tokens_per_dimension: float
    verdict: str  # "measured", "too few tokens", "inconclusive", "not applicable"
    reason: str

    @property
    def site(self) -> str:
        """Where it reads and writes, as `Site.key`."""
        return Site(self.writes, read=self.reads).key


@dataclass(frozen=True)
class Behaviour:
    """What one way of steering costs in the model's output, against the tuned model.

    `measure` is "kl" (logits: nats per token) or "output" (no logits: squared relative
    difference of the final output); `distance` is that figure, and `recovered` is
    1 − distance / distance of the unsteered model, with its bootstrap interval.
    """

    reads: str  # "" for the unsteered model and for oracles, which read nothing
    writes: str  # "" for the unsteered model
    rung: str  # "unsteered", "vector", "affine r8", "first-order oracle", …
    layers: str  # "all" or the index of a single layer
    target: str
    measure: str
    distance: float
    recovered: float | None
    recovered_low: float | None
    recovered_high: float | None
    distance_p999: float | None
    distance_max: float | None
    same_top: float | None
    loss: float | None  # mean cross-entropy on the labels, in nats
    loss_tuned: float | None  # that of the tuned model
    output_difference: float | None
    output_cosine: float | None
    strength: float | None
    num_parameters: int | None
    parameter_share: float | None
    sequences: int
    reason: str = ""

    @property
    def site(self) -> str:
        """Where it reads and writes, as `Site.key`; "" for the unsteered model."""
        return Site(self.writes, read=self.reads).key


@dataclass(frozen=True)
class Subject:
    """What was measured: the model, the update, the inputs and the settings."""

    model: str
    num_parameters: int
    num_layers: int
    d_model: int | None
    update: str
    update_norm: float
    update_relative_norm: float
    update_names: int
    inputs: str  # "random", "samples", "texts", "given"
    sequences: int
    tokens: int
    held_out_sequences: int
    calculus_tokens: int  # drawn from all tokens, for orders and superposition
    seed: int
    at: str
    target: str
    rank: int
    max_remainder: float | None
    tolerance: float
    versions: tuple[tuple[str, str], ...]
    encoder_layers: int = 0  # of an encoder–decoder: the first ones are the encoder's
