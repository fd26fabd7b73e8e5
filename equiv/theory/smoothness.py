"""Where a model is not twice differentiable, by what its modules are.

A remainder has order 2 where the model is smooth. A ReLU that changes its sign within
the step leaves one that shrinks more slowly: a share of units in proportion to t does,
each by an amount in proportion to t, so the norm of the rest is of order 3/2. A mixture
of experts jumps where a token goes to another expert. That is true of the model and
tells nothing against a statement about smooth ones.
"""

from dataclasses import replace

from torch import nn

from equiv.model.families import find_blocks
from equiv.model.routing import routers
from equiv.theory.values import ClaimResult, Verdict

KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
)


def kinks(model: nn.Module) -> tuple[str, ...]:
    """Kinds of the model's modules that have a kink, or choose experts.

    Example:
        >>> kinks(nn.Sequential(nn.ReLU(), nn.GELU(), nn.ReLU()))
        ('ReLU',)
    """
    found = {type(m).__name__ for m in model.modules() if isinstance(m, KINKED)}
    blocks = find_blocks(model)
    gates = routers(blocks).values() if blocks else ()
    return tuple(sorted(found | {type(gate).__name__ for gate in gates}))


def of_smooth(result: ClaimResult, model: nn.Module) -> ClaimResult:
    """The result of a claim about smooth models: a model with kinks cannot refute it.

    Args:
        result: As measured.
        model: What it was measured on.
    """
    found = kinks(model)
    if result.verdict is not Verdict.FAILS or not found:
        return result
    says = f"the model is not smooth ({', '.join(found)}): {result.says}"
    return replace(result, verdict=Verdict.NOT_APPLICABLE, says=says)
