"""Any module: sites by name and pattern, and what a submodule must be to be one.

The witness is one `jvp` of the whole module with hooks of its own.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import witness
from torch import Tensor, nn
from torch.func import functional_call, jvp

import equiv
from equiv.testing.models import mlp, transformer

IDS = torch.randint(3, 32, (4, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)).double()


@dataclass
class Pair:
    first: Tensor
    second: Tensor


class Two(nn.Module):
    """Returns what it is told to: a tuple, a dataclass, a mapping."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(6, 6), kind

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x).tanh()
        if self.kind is dict:
            return {"first": y, "second": x}
        return (y, x) if self.kind is tuple else Pair(y, x)


class Net(nn.Module):
    """Of everything something: see the names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.twice = nn.Linear(6, 6)
        self.pair, self.data, self.mapping = Two(tuple), Two(Pair), Two(dict)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.pair.inner.weight
        self.alias = self.enter
        self.never = nn.Linear(2, 2)
        self.counts = nn.Identity()
        self.leave = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 0.5, 0.1, 1.0]))
        self.register_buffer("shift", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.enter(x)).tanh() * self.scale + self.shift
        h = self.twice(self.twice(h).tanh())
        h = h + self.pair(h)[0] + self.data(h).first + self.mapping(h)["first"]
        self.counts(torch.arange(3))
        return self.leave(self.tied(h).tanh())


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    model(torch.randn(32, 4).double())  # the norm's running figures
    return model.eval()


def slopes(model: nn.Module, update: equiv.Update, name: str) -> tuple[Tensor, Tensor]:
    """An activation and its derivative along the update, on a copy.

    `functional_call` leaves its own parameters in a module that goes by two names.
    """
    model = copy.deepcopy(model)
    change = witness.dense(update)
    at = {n: p.detach() for n, p in model.named_parameters()}

    def run(own: dict[str, Tensor]) -> Tensor:
        seen = []
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
        functional_call(model, {**at, **own}, (X,))
        handle.remove()
        return seen[0]

    with torch.no_grad():
        moving = {n: at[n] for n in change}
        value, slope = jvp(run, (moving,), (change,))[:2]
    return value, slope


SITES = ("enter", "norm", "pair.inner", "data.inner", "mapping.inner", "tied")


@pytest.mark.parametrize("asked", [SITES, None, ("*",)])
def test_sites_of_a_module(asked: Any) -> None:
    """All that are called once and return an activation; tied weights are one."""
    model = net()
    update = equiv.Update.random(model, 0.05, seed=0)
    found = equiv.shifts(model, update, X, sites=asked, dtype=torch.float64)
    shifts = {s.site: s for s in found}
    assert set(shifts) == set(SITES)
    for name, s in shifts.items():
        value, slope = slopes(model, update, name)
        witness.close(s.base, value)
        witness.close(s.first_order, slope)
    report = equiv.check(model, update.scaled(0.1), X, sites=asked, forms=())
    assert report.derivative_holds
    assert {row.site for row in report.rows} == {*SITES, "output"}


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (("*.inner",), ("pair.inner", "data.inner", "mapping.inner")),
        (("tied", "n*", "tied"), ("tied", "norm")),
        (("[ep]*",), ("enter", "pair.inner")),
        (("enter->tied",), ("enter", "tied")),
    ],
)
def test_patterns_of_submodules(asked: Any, names: Any) -> None:
    model = net()
    update = equiv.Update.random(model, 0.05, seed=0)
    report = equiv.check(model, update, X, sites=asked, forms=())
    sites = [row.site for row in report.rows if row.site != "output"]
    assert tuple(sites) == names


def test_patterns_of_sites_in_blocks() -> None:
    model = transformer("llama")
    update = equiv.Update.random(model, 0.05, seed=0)
    found = [s.site for s in equiv.shifts(model, update, IDS, sites=("mlp_*",))]
    assert found == ["mlp_in", "mlp_hidden", "mlp_out"] * 2
    report = equiv.check(model, update, IDS, sites=("*_out", "resid_mid"), forms=())
    sites = {row.site for row in report.rows}
    assert sites == {"attn_out", "mlp_out", "block_out", "resid_mid", "logits"}
    with pytest.raises(equiv.SiteError, match=r"No site matches 'ml\?'"):
        equiv.shifts(model, update, IDS, sites=("ml?",))


REFUSED = {
    "twice": "`twice` is no site: it is called 2 times",
    "pair": "`pair` is no site: it returns a tuple of 2",
    "data": "`data` is no site: it returns a Pair",
    "mapping": "`mapping` is no site: it returns a dict",
    "alias": "`alias` is no site: it is the same module as `enter`",
    "never": "`never` is no site: it is not called",
    "counts": "`counts` is no site: it returns a tensor of torch.int64",
    "entre": "the model has no such submodule; did you mean 'enter'?",
    "z": "there are enter, norm, twice",
    "enter->pair": "`pair` is no site",
    "tw*": "No submodule that 'tw*' matches is a site (1 of them); of `twice`: it is c",
    "q*": "No submodule matches 'q*'; there are enter, norm",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", [equiv.check, equiv.shifts])
def test_what_is_no_site_is_refused_with_its_reason(name: str, call: Any) -> None:
    model = net()
    update = equiv.Update.random(model, 0.05, seed=0)
    with pytest.raises(equiv.SiteError) as caught:
        call(model, update, X, sites=(name,))
    assert REFUSED[name] in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("call", [equiv.check, equiv.shifts])
def test_a_module_of_two_names_keeps_its_own_parameters(call: Any) -> None:
    """What `functional_call` puts into it must not stay, whatever is measured."""
    model = net()
    own = {name: id(p) for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = call(model, equiv.Update.random(model, 0.05, seed=0), X, sites=None)
    if call is equiv.shifts:
        assert list(found)  # computed when asked for
    assert {name: id(p) for name, p in model.named_parameters()} == own
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_norm_is_measured_in_eval_mode_and_left_alone() -> None:
    """Running figures enter as they are, whatever mode the model is in."""
    model = net()
    update = equiv.Update.random(model, 0.05, seed=0)
    expected = equiv.shifts(model, update, X, sites=("norm",))[0, "norm"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = equiv.shifts(model, update, X, sites=("norm",))[0, "norm"]
    assert torch.equal(found.first_order, expected.first_order)
    assert model.training and model.norm.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_buffers_of_the_state_dict_alone_enter_as_they_are() -> None:
    """They scale activations, have no shift, and equal ones are no update."""
    base, tuned = net(), net()
    with torch.no_grad():
        tuned.leave.weight += 0.1
        tuned.tied.weight += 0.01  # of one tensor with `pair.inner`
    update = equiv.Update.between(base, tuned)
    assert not any("scale" in name or "running" in name for name in update.deltas)
    _, slope = slopes(base, update, "tied")
    s = equiv.shifts(base, update, X, sites=("tied",), dtype=torch.float64)[0, "tied"]
    witness.close(s.first_order, slope)
    assert float(slope.norm()) > 0


def test_a_module_is_a_sequential_of_named_parts_too() -> None:
    model = mlp((4, 6, 6, 3))
    update = equiv.Update.random(model, 0.1, seed=0)
    found = [s.site for s in equiv.shifts(model, update, X, sites=("[0-3]",))]
    assert found == ["0", "1", "2", "3"]
