"""`torch.compile` and steering, in either order, whole models and blocks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from steered import CASES, llama, run, steering, unchanged
from torch import nn

import equiv
from equiv.model.calls import Note, note_calls


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "backend", "names"),
    [
        ("torch.compile", "eager", tuple(CASES)),
        ("torch.compile", "aot_eager", ("all", "rows and positions")),
        ("model.compile", "eager", ("other sites", "one more site", "positions")),
        ("blocks", "eager", ("other sites", "one more site", "positions")),
    ],
)
@torch.no_grad()
def test_a_compiled_model_is_steered(
    how: str, backend: str, names: tuple[str, ...], fresh_dynamo: None
) -> None:
    """Compiled and run before there was any steering; in one graph; and back again."""
    model, plain = llama(), llama()
    settings: dict[str, Any] = {"backend": backend, "fullgraph": True}
    compiled: Any = model
    if how == "torch.compile":
        compiled = torch.compile(model, **settings)
    elif how == "model.compile":
        model.compile(**settings)
    else:
        for block in model.model.layers:
            block.compile(**settings)
    before = run(compiled)
    torch.testing.assert_close(before, run(plain))
    with unchanged(model):
        for steers, how_steered in (CASES[name] for name in names):
            with equiv.steer(plain, steers, **how_steered):
                expected = run(plain)
            with equiv.steer(compiled, steers, **how_steered):
                found = run(compiled)
            torch.testing.assert_close(found, expected)
            assert not torch.allclose(found, before)
            assert torch.equal(run(compiled), before)


@torch.no_grad()
def test_a_steered_model_can_be_compiled(fresh_dynamo: None) -> None:
    """Steered first, compiled then; the graph serves other steers at the same sites."""
    model = llama()
    before = run(model)
    with equiv.steer(model, steering()):
        expected = run(model)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled), expected)
        graphs = graphs_made()
        torch.testing.assert_close(run(compiled), expected)
        assert graphs_made() == graphs  # nothing is left to be done at a second call
    torch.testing.assert_close(run(compiled), before)
    graphs = graphs_made()
    for seed in range(10):  # more than `recompile_limit`
        with equiv.steer(model, steering(seed)):
            expected = run(model)
            torch.testing.assert_close(run(compiled), expected)
        torch.testing.assert_close(run(compiled), before)
    assert graphs_made() == graphs


def graphs_made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_compiled_without_steering_and_hooks_alone_is_what_goes_wrong(
    fresh_dynamo: None,
) -> None:
    """Why notes are needed. Should this fail, PyTorch guards empty lists of hooks."""
    model = nn.Sequential(nn.Linear(4, 4))
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.ones(1, 4)
    before = compiled(x)

    def add(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 1

    handle = model[0].register_forward_hook(add)
    assert torch.equal(compiled(x), before)  # silently without the hook
    remove = note_calls(model[0], "forward", Note())
    torch.testing.assert_close(compiled(x), before + 1)
    remove()
    handle.remove()
    assert torch.equal(compiled(x), before)
