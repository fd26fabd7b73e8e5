"""Submodules that return tuples: sites where it is clear what carries the stream."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import witness
from torch import Tensor, nn
from torch.func import functional_call, jvp

import equiv
from equiv.errors import InputsError

X = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1)).double()


class Named(NamedTuple):
    hidden: Tensor
    chosen: Tensor


@dataclass
class Found:
    logits_of_mine: Tensor
    chosen: Tensor


class Part(nn.Module):
    """Returns its activation in the company that it is told."""

    def __init__(self, company: str) -> None:
        super().__init__()
        self.inner, self.company = nn.Linear(4, 4), company

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x).tanh()
        return {
            "alone": lambda: (y,),
            "nothing": lambda: (y, None),
            "list": lambda: [y, (None, True, 3)],
            "indices": lambda: (y, y.argmax(-1)),
            "named": lambda: Named(y, y.argmax(-1)),
            "two": lambda: (y, x),
            "nested": lambda: (y, [None, (x,)]),
            "object": lambda: (y, Found(y, x)),
            "last": lambda: (None, y),
        }[self.company]()


class Net(nn.Module):
    def __init__(self, company: str) -> None:
        super().__init__()
        self.part, self.leave = Part(company), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        out = self.part(x)
        if self.part.company == "named":
            assert out.chosen.dtype == torch.int64
        if self.part.company == "list":
            assert isinstance(out, list)
        return self.leave(out[0] if out[0] is not None else out[1])


def net(company: str) -> Net:
    torch.manual_seed(0)
    return Net(company).double()


CLEAR = ("alone", "nothing", "list", "indices", "named")


@pytest.mark.parametrize("company", CLEAR)
def test_an_activation_in_company_is_a_site(company: str) -> None:
    model = net(company)
    update = equiv.Update.random(model, 0.1, seed=0)
    change = witness.dense(update)
    at = {n: p.detach() for n, p in model.named_parameters()}

    def run(own: dict[str, Tensor]) -> Tensor:
        return torch.tanh(
            nn.functional.linear(X, own["part.inner.weight"], own["part.inner.bias"])
        )

    value, slope = jvp(run, (at,), (change,))[:2]
    shifts = equiv.shifts(model, update, X, sites=("part",), dtype=torch.float64)
    witness.close(shifts[0, "part"].base, value)
    witness.close(shifts[0, "part"].first_order, slope)
    assert "part" in {s.site for s in equiv.shifts(model, update, X, sites=None)}
    report = equiv.check(model, update.scaled(0.1), X, sites=("part",))
    assert report.derivative_holds and report.fits


@pytest.mark.parametrize("company", CLEAR)
def test_what_is_added_there_arrives(company: str) -> None:
    model = net(company)
    v = torch.arange(4.0).double()
    with equiv.steer(model, {(0, "part"): equiv.Vector(v)}):
        steered = model(X)
    witness.close(steered, model(X) + v @ model.leave.weight.T)


@pytest.mark.parametrize("company", ["two", "nested", "object", "last"])
def test_what_is_not_clear_is_refused_by_name(company: str) -> None:
    model = net(company)
    update = equiv.Update.random(model, 0.1, seed=0)
    words = "`part` is no site: it returns a tuple of 2"
    with pytest.raises(equiv.SiteError, match=words):
        equiv.shifts(model, update, X, sites=("part",))
    found = equiv.shifts(model, update, X, sites=None)
    assert [s.site for s in found] == ["part.inner"]


class Ends(nn.Module):
    """Returns a dataclass, of tensors or of none."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.enter, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Any:
        y = self.enter(x).tanh()
        return self.kind(y)


def test_a_model_may_return_a_dataclass() -> None:
    model = Ends(lambda y: Found(y, y.argmax(-1))).double()
    update = equiv.Update.random(model, 0.1, seed=0)
    report = equiv.check(model, update, X)
    row = next(r for r in report.rows if r.site == "output")
    moved = {n: p + update.deltas[n] for n, p in model.named_parameters()}  # type: ignore[operator]
    tuned = functional_call(model, moved, (X,)).logits_of_mine
    size = float((tuned - model(X).logits_of_mine).norm().detach())
    assert row.norm_exact == pytest.approx(size, rel=1e-6)


def test_a_model_that_returns_no_tensor_first_is_refused_in_few_words() -> None:
    model = Ends(lambda y: Found("no tensor", y)).double()  # type: ignore[arg-type]
    update = equiv.Update.random(model, 0.1, seed=0)
    with pytest.raises(InputsError, match="starts with one, got a tuple") as caught:
        equiv.check(model, update, X)
    assert len(str(caught.value)) < 300
