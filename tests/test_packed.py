"""Quantised bases whose tensors give their values back: measured through these.

The witness is the same model with those values as plain weights.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import witness
from alive import Alive
from torch import Tensor, nn

import equiv
from equiv.model.around import Around
from equiv.model.packed import is_packed
from equiv.testing.models import transformer
from equiv.update.low_rank import LowRank

IDS = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(0))


class Eighth(Tensor):
    """A weight in int8 with a scale per row; knows `linear` and little else."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Eighth":
        return Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, codes.shape, dtype=scale.dtype, requires_grad=False
        )

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"no {func} here")


def toy(model: nn.Module) -> None:
    """Every matrix of a `Linear` in int8, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().to(torch.int8)
            packed = nn.Parameter(Eighth(codes, scale), requires_grad=False)
            module.weight = packed


def torchao(model: nn.Module) -> None:
    """The same by torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.fixture(params=[toy, torchao])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A quantised model, and one with the same values as plain weights."""
    quantise: Callable[[nn.Module], None] = request.param
    model = transformer("llama", seed=1, dtype=torch.float32)
    plain = copy.deepcopy(model)
    quantise(model)
    packed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_packed(parameter):
                plain.get_parameter(name).copy_(parameter.dequantize())
                packed += 1
    assert packed >= 14
    return model, plain


def updates(plain: nn.Module) -> dict[str, equiv.Update]:
    """Of all weights, and in factors."""
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: LowRank(
            0.05 * torch.randn(p.shape[0], 2, generator=generator),
            0.05 * torch.randn(2, p.shape[1], generator=generator),
        )
        for name, p in plain.named_parameters()
        if "proj" in name
    }
    dense = equiv.Update.random(plain, 0.05, seed=2)
    return {"dense": dense, "factors": equiv.Update.from_dict(factors)}


def test_reports_are_those_of_the_values(pair: tuple[nn.Module, nn.Module]) -> None:
    model, plain = pair
    kept = {name: id(p) for name, p in model.named_parameters()}
    given = updates(plain)
    settings: dict[str, Any] = {"sites": ("block_out",), "forms": ("vector",)}
    found = equiv.check(model, given, IDS, **settings)
    wanted = equiv.check(plain, given, IDS, **settings)
    for name, report in found.items():
        (note,) = set(report.notes) - set(wanted[name].notes)
        assert note.startswith("the base is quantised (")
        assert dataclasses.replace(report, notes=wanted[name].notes) == wanted[name]
    assert {name: id(p) for name, p in model.named_parameters()} == kept


def test_updates_are_told_from_weights_and_made(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, plain = pair
    mine, theirs = (equiv.Update.random(m, 0.05, seed=2) for m in pair)
    for name, delta in witness.dense(theirs).items():
        assert torch.equal(witness.dense(mine)[name], delta)
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    with pytest.raises(equiv.UpdateError, match="look like the weights themselves"):
        equiv.check(model, weights, IDS)
    original = transformer("llama", seed=1, dtype=torch.float32)
    rounding = equiv.Update.between(original, model)  # what quantisation did
    expected = witness.dense(equiv.Update.between(original, plain))
    found = witness.dense(rounding)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.equal(found[name], delta)


def test_weights_of_one_block_are_unpacked_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = transformer("llama", seed=1, dtype=torch.float32, num_hidden_layers=6)
    update = equiv.Update.random(model, 0.05, seed=2)
    toy(model)
    held = Alive().watch(Around, "cast", monkeypatch)
    list(equiv.shifts(model, update, IDS))
    # The tensors of one block, of the one before, and a few around the blocks; of 57.
    assert 9 <= held.most <= 2 * 9 + 6


def test_a_weight_that_is_not_finite_is_found() -> None:
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    toy(model)
    weight: Any = model.model.layers[1].mlp.up_proj.weight
    weight.scale[0] = torch.nan
    with pytest.raises(equiv.UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj"):
        equiv.check(model, update, IDS)


def test_bitsandbytes_is_refused_with_what_to_do() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = transformer("llama", seed=1, dtype=torch.float32)
    update = equiv.Update.random(model, 0.05, seed=2)
    up = model.model.layers[0].mlp.up_proj
    packed = bnb.nn.Linear4bit(up.in_features, up.out_features, bias=False)
    packed.load_state_dict(up.state_dict())
    model.model.layers[0].mlp.up_proj = packed.to("cpu")
    with pytest.raises(equiv.UnsupportedModelError, match="quantised") as caught:
        equiv.check(model, update, IDS)
    assert "\n" not in str(caught.value)
