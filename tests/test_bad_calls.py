"""Wrong calls fail at the door, with a message that says what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import equiv
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.vector import Vector
from equiv.testing.models import mlp, transformer

IDS = torch.tensor([[3, 9, 4], [5, 6, 7]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def net() -> nn.Module:
    return mlp((3, 4, 2), dtype=torch.float32)


def one() -> dict[str, torch.Tensor]:
    return {"0.weight": torch.ones(4, 3)}


def llama() -> Any:
    return transformer("llama", dtype=torch.float32)


def random(model: nn.Module) -> equiv.Update:
    return equiv.Update.random(model, 0.1, seed=0)


def gpt2() -> Any:
    return transformer("gpt2", dtype=torch.float32)


def fed(inputs: object) -> equiv.Report:
    """A check of a Llama on these inputs."""
    model = llama()
    return equiv.check(model, random(model), inputs)


def steered(model: nn.Module, steering: Any) -> None:
    with equiv.steer(model, steering):
        model(torch.ones(5, 3))


def quantised() -> nn.Module:
    model = llama()
    model.config.quantization_config = type("Q", (), {"quant_method": "gptq"})()
    return model


@dataclass
class Bad:
    error: type[equiv.EquivError]
    says: tuple[str, ...]  # every part of the message that a user needs
    call: Callable[[], object]


TABLE = {
    "unknown parameter name": Bad(
        equiv.UpdateMismatchError,
        ("`0.wieght`", "Did you mean `0.weight`", "named_parameters"),
        lambda: equiv.check(net(), {"0.wieght": torch.ones(4, 3)}),
    ),
    "wrong shape": Bad(
        equiv.UpdateMismatchError,
        ("`0.weight`", "(3, 4)", "expects (4, 3)"),
        lambda: equiv.check(net(), {"0.weight": torch.ones(3, 4)}),
    ),
    "integer update": Bad(
        equiv.UpdateError,
        ("floating dtype", "`0.weight`", "torch.int64"),
        lambda: equiv.check(net(), {"0.weight": torch.ones(4, 3, dtype=torch.int64)}),
    ),
    "no tensor": Bad(
        equiv.UpdateError,
        ("Expected a tensor", "`0.weight`", "list"),
        lambda: equiv.check(net(), {"0.weight": [1.0]}),  # type: ignore[dict-item]
    ),
    "update without values": Bad(
        equiv.UpdateError,
        ("`0.weight`", "meta"),
        lambda: equiv.check(net(), {"0.weight": torch.ones(4, 3, device="meta")}),
    ),
    "NaN in the update": Bad(
        equiv.UpdateError,
        ("`0.weight`", "1 NaN or infinite", "finite"),
        lambda: equiv.check(net(), {"0.weight": _with(torch.nan)}),
    ),
    "infinity in the update": Bad(
        equiv.UpdateError,
        ("`0.weight`", "1 NaN or infinite"),
        lambda: equiv.check(net(), {"0.weight": _with(torch.inf)}),
    ),
    "buffer": Bad(
        equiv.UpdateMismatchError,
        ("`scale` is a buffer", "parameters only"),
        lambda: equiv.check(Buffered(), {"scale": torch.ones(3)}),
    ),
    "tied weight given twice": Bad(
        equiv.UpdateError,
        ("one tied weight", "two different values", "Give one"),
        lambda: equiv.check(
            Tied(), {"a.weight": torch.ones(3, 3), "b.weight": torch.zeros(3, 3)}
        ),
    ),
    "empty update": Bad(
        equiv.UpdateError,
        ("update is empty",),
        lambda: equiv.check(net(), {}),
    ),
    "the same model twice": Bad(
        equiv.UpdateError,
        ("same object", "copy.deepcopy"),
        lambda: (lambda model: equiv.check(model, model))(net()),
    ),
    "equal models": Bad(
        equiv.UpdateError,
        ("equal everywhere",),
        lambda: equiv.check(net(), net()),
    ),
    "tuned model of another size": Bad(
        equiv.UpdateMismatchError,
        ("shape", "resize the base"),
        lambda: equiv.check(llama(), transformer("llama", vocab_size=40)),
    ),
    "tuned model with other names": Bad(
        equiv.UpdateMismatchError,
        ("one side only", "missing from"),
        lambda: equiv.check(net(), mlp((3, 4, 4, 2), dtype=torch.float32)),
    ),
    "no update at all": Bad(
        equiv.UpdateError,
        ("Expected `delta_w`", "got int"),
        lambda: equiv.check(net(), 3),  # type: ignore[arg-type]
    ),
    "a path that holds nothing": Bad(
        equiv.FileFormatError,
        ("/nowhere",),
        lambda: equiv.check(llama(), "/nowhere/at/all"),
    ),
    "inputs of the wrong width": Bad(
        equiv.InputsError,
        ("cannot be run on these inputs", "Sequential"),
        lambda: equiv.check(net(), one(), torch.ones(5, 7)),
    ),
    "token ids out of range": Bad(
        equiv.InputsError,
        ("0…31", "3…99", "tokenizer"),
        lambda: equiv.check(llama(), random(llama()), torch.tensor([[3, 99]])),
    ),
    "negative token ids": Bad(
        equiv.InputsError,
        ("-100…3",),
        lambda: equiv.check(llama(), random(llama()), torch.tensor([[3, -100]])),
    ),
    "everything masked": Bad(
        equiv.InputsError,
        ("Every token is masked", "at least one token"),
        lambda: equiv.check(
            llama(),
            random(llama()),
            {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
        ),
    ),
    "no inputs": Bad(
        equiv.InputsError,
        ("at least one batch",),
        lambda: equiv.check(net(), one(), []),
    ),
    "texts without a tokenizer": Bad(
        equiv.InputsError,
        ("tokenizer=", "AutoTokenizer"),
        lambda: equiv.check(llama(), random(llama()), ["a b", "c"]),
    ),
    "texts for a plain module": Bad(
        equiv.InputsError,
        ("Texts need a Hugging Face model", "pass tensors"),
        lambda: equiv.check(net(), one(), ["a b"]),
    ),
    "inputs of another kind": Bad(
        equiv.InputsError,
        ("Expected `inputs`", "got int"),
        lambda: equiv.check(net(), one(), 5),
    ),
    "one axis only": Bad(
        equiv.InputsError,
        ("batch axis and a seq axis", "(3,)"),
        lambda: equiv.check(llama(), random(llama()), torch.tensor([3, 4, 5])),
    ),
    "an argument that the model does not take": Bad(
        equiv.InputsError,
        ("cannot be run", "colour"),
        lambda: equiv.check(net(), one(), {"colour": torch.ones(5, 3)}),
    ),
    "samples of a model that generates nothing": Bad(
        equiv.InputsError,
        ("generates text", "Sequential"),
        lambda: equiv.check(net(), one(), "samples"),
    ),
    "model on meta": Bad(
        equiv.UnsupportedModelError,
        ("`0.weight` is on the meta device", "Load the weights"),
        lambda: equiv.check(net().to("meta"), one()),
    ),
    "quantised model": Bad(
        equiv.UnsupportedModelError,
        ("quantised (gptq)", "dequantised"),
        lambda: equiv.check(quantised(), {"lm_head.weight": torch.ones(32, 16)}),
    ),
    "no model": Bad(
        equiv.UnsupportedModelError,
        ("torch.nn.Module", "got str"),
        lambda: equiv.check("gpt2", one()),  # type: ignore[arg-type]
    ),
    "a family that changes itself": Bad(
        equiv.UnsupportedModelError,
        ("RwkvForCausalLM", "divides its own weights"),
        lambda: equiv.check(_rwkv(), {"head.weight": torch.ones(9, 8)}, IDS),
    ),
    "a layer that is not there": Bad(
        equiv.SiteError,
        ("0…1", "[99]"),
        lambda: equiv.check(llama(), random(llama()), IDS, layers=[99]),
    ),
    "no layers": Bad(
        equiv.SiteError,
        ("0…1", "[]"),
        lambda: equiv.check(llama(), random(llama()), IDS, layers=[]),
    ),
    "a site that is not there": Bad(
        equiv.SiteError,
        ("attn_heads, attn_out, cross_out, resid_mid", "resid"),
        lambda: equiv.check(llama(), random(llama()), IDS, sites=("resid",)),
    ),
    "a submodule that is not there": Bad(
        equiv.SiteError,
        ("`7` is no site", "there are 0, 1, 2"),
        lambda: equiv.check(net(), one(), torch.ones(5, 3), sites=("7",)),
    ),
    "a string of sites": Bad(
        equiv.ArgumentError,
        ("`sites`", "tuple of names", "'0'"),
        lambda: equiv.check(net(), one(), sites="0"),
    ),
    "a form that is not there": Bad(
        equiv.ArgumentError,
        ("`forms`", "vector, affine", "'cubic'"),
        lambda: equiv.check(net(), one(), forms=("cubic",)),
    ),
    "rank zero": Bad(
        equiv.ArgumentError,
        ("`rank`", ">= 1", "0"),
        lambda: equiv.check(net(), one(), rank=0),
    ),
    "a target that is not there": Bad(
        equiv.ArgumentError,
        ("`target`", "block, shift"),
        lambda: equiv.check(net(), one(), target="logits"),
    ),
    "a point that is not there": Bad(
        equiv.ArgumentError,
        ("`at`", "both, base, midpoint"),
        lambda: equiv.check(net(), one(), at="end"),
    ),
    "a negative threshold": Bad(
        equiv.ArgumentError,
        ("`max_remainder`", "number >= 0", "-1.0"),
        lambda: equiv.check(net(), one(), max_remainder=-1.0),
    ),
    "half precision": Bad(
        equiv.ArgumentError,
        ("`dtype`", "torch.bfloat16"),
        lambda: equiv.check(net(), one(), dtype=torch.bfloat16),
    ),
    "a fit on nothing": Bad(
        equiv.ArgumentError,
        ("every token is masked",),
        lambda: equiv.fit(
            torch.ones(2, 3, 4), torch.ones(2, 3, 4), mask=torch.zeros(2, 3)
        ),
    ),
    "a fit on two shapes": Bad(
        equiv.ArgumentError,
        ("same leading axes", "(2, 3, 4)", "(2, 5, 4)"),
        lambda: equiv.fit(torch.ones(2, 3, 4), torch.ones(2, 5, 4)),
    ),
    "nothing left of an update": Bad(
        equiv.UpdateError,
        ("Nothing of the update is left", "layers=[7]"),
        lambda: random(llama()).restricted(layers=[7]),
    ),
    "a report that is none": Bad(
        equiv.FileFormatError,
        ("pyproject.toml", "not JSON"),
        lambda: equiv.Report.from_json("pyproject.toml"),
    ),
    "a seed that is no integer": Bad(
        equiv.ArgumentError,
        ("`seed`", "integer in 0…9223372036854775807", "'0'"),
        lambda: equiv.check(net(), one(), seed="0"),  # type: ignore[arg-type]
    ),
    "a truth value as seed": Bad(
        equiv.ArgumentError,
        ("`seed`", "integer", "True"),
        lambda: equiv.check(net(), one(), seed=True),
    ),
    "no seed": Bad(
        equiv.ArgumentError,
        ("`seed`", "integer", "None"),
        lambda: equiv.check(net(), one(), seed=None),  # type: ignore[arg-type]
    ),
    "a negative seed": Bad(
        equiv.ArgumentError,
        ("`seed`", "-1"),
        lambda: equiv.check(net(), one(), seed=-1),
    ),
    "a seed that is too large": Bad(
        equiv.ArgumentError,
        ("`seed`", "9223372036854775808"),
        lambda: equiv.check(net(), one(), seed=2**63),
    ),
    "a broken rank": Bad(
        equiv.ArgumentError,
        ("`rank`", "integer >= 1", "2.0"),
        lambda: equiv.check(net(), one(), rank=2.0),  # type: ignore[arg-type]
    ),
    "one layer without brackets": Bad(
        equiv.ArgumentError,
        ("`layers`", "as in [0, 1]", "got 0"),
        lambda: equiv.check(net(), one(), layers=0),  # type: ignore[arg-type]
    ),
    "layers by name": Bad(
        equiv.ArgumentError,
        ("`layers`", "integers", "'0'"),
        lambda: equiv.check(net(), one(), layers=["0"]),  # type: ignore[list-item]
    ),
    "layers as a mask": Bad(
        equiv.ArgumentError,
        ("`layers`", "integers", "True"),
        lambda: equiv.check(net(), one(), layers=[True]),
    ),
    "a threshold in words": Bad(
        equiv.ArgumentError,
        ("`max_remainder`", "number >= 0, or None", "'0.1'"),
        lambda: equiv.check(net(), one(), max_remainder="0.1"),  # type: ignore[arg-type]
    ),
    "a threshold of NaN": Bad(
        equiv.ArgumentError,
        ("`max_remainder`", "nan"),
        lambda: equiv.check(net(), one(), max_remainder=float("nan")),
    ),
    "no forms but None": Bad(
        equiv.ArgumentError,
        ("`forms`", "('vector', 'affine')", "None"),
        lambda: equiv.check(net(), one(), forms=None),  # type: ignore[arg-type]
    ),
    "sites that are no names": Bad(
        equiv.ArgumentError,
        ("`sites`", "tuple of names", "(0,)"),
        lambda: equiv.check(net(), one(), sites=(0,)),  # type: ignore[arg-type]
    ),
    "a dtype in words": Bad(
        equiv.ArgumentError,
        ("`dtype`", "'float64'", "pass `dtype=torch.float64`"),
        lambda: equiv.check(net(), one(), dtype="float64"),  # type: ignore[arg-type]
    ),
    "an array of words": Bad(
        equiv.InputsError,
        ("`input_ids`", "list of list", 'return_tensors="pt"', "torch.as_tensor"),
        lambda: fed({"input_ids": [["a", "b"]]}),
    ),
    "ragged lists": Bad(
        equiv.InputsError,
        ("`inputs`", "list of list of lengths 1…2", "padding=True"),
        lambda: fed([[3, 4], [5]]),
    ),
    "no sequences": Bad(
        equiv.InputsError,
        ("at least one sequence", "(0, 3)"),
        lambda: fed(IDS[:0]),
    ),
    "no tokens": Bad(
        equiv.InputsError,
        ("one token", "(2, 0)"),
        lambda: fed([IDS, IDS[:, :0]]),
    ),
    "token ids with three axes": Bad(
        equiv.InputsError,
        ("integers [batch, seq]", "torch.int64 of shape (1, 2, 3)"),
        lambda: fed(IDS[None]),
    ),
    "token ids as floats": Bad(
        equiv.InputsError,
        ("integers [batch, seq]", "[batch, seq, d]", "torch.float32"),
        lambda: fed(IDS.float()),
    ),
    "a tokenizer by name": Bad(
        equiv.InputsError,
        ("tokenizer=", "'gpt2'", "AutoTokenizer"),
        lambda: equiv.check(llama(), random(llama()), ["a"], tokenizer="gpt2"),
    ),
    "a text that is missing": Bad(
        equiv.InputsError,
        ("a text at index 1", "None"),
        lambda: fed(["a b", None]),
    ),
    "samples misspelt": Bad(
        equiv.InputsError,
        ("'sample'", 'did you mean "samples"'),
        lambda: fed("sample"),
    ),
    "samples where nothing is sampled": Bad(
        equiv.InputsError,
        ('"samples"', "only `equiv.check`"),
        lambda: equiv.shifts(llama(), random(llama()), "samples"),
    ),
    "sparse inputs": Bad(
        equiv.InputsError,
        ("dense", "torch.sparse_coo", ".to_dense()"),
        lambda: fed(IDS.to_sparse()),
    ),
    "more tokens than positions": Bad(
        equiv.InputsError,
        ("at most 64", "got 65", "Cut or split"),
        lambda: equiv.shifts(gpt2(), random(gpt2()), torch.ones(1, 65).long()),
    ),
    "NaN in the inputs": Bad(
        equiv.InputsError,
        ("finite", "`inputs`", "1 NaN"),
        lambda: equiv.check(net(), one(), torch.tensor([[1.0, torch.nan, 2.0]])),
    ),
    "infinite embeddings": Bad(
        equiv.InputsError,
        ("finite", "`inputs_embeds`", "6 NaN or infinite"),
        lambda: fed(torch.full((1, 3, 2), torch.inf)),
    ),
    "a cache": Bad(
        equiv.InputsError,
        ("past_key_values", "whole sequences"),
        lambda: fed({"input_ids": IDS, "past_key_values": ()}),
    ),
    "a mask of another shape": Bad(
        equiv.InputsError,
        ("`attention_mask` of shape (2, 3)", "(2, 1, 3, 3)", "got (2, 4)"),
        lambda: fed({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}),
    ),
    "tensors without names": Bad(
        equiv.InputsError,
        ("index 0", "2 tensors", "pass mappings"),
        lambda: fed([(IDS, torch.ones_like(IDS))]),
    ),
    "a batch that is none": Bad(
        equiv.InputsError,
        ("Expected tensors or mappings", "None at index 1"),
        lambda: fed([IDS, None]),
    ),
    "inputs without a tensor": Bad(
        equiv.InputsError,
        ("Expected a tensor", "{'input_ids': 'str'}"),
        lambda: fed({"input_ids": "a b"}),
    ),
    "a layer that is not there, as shifts": Bad(
        equiv.SiteError,
        ("0…1", "[2]"),
        lambda: equiv.shifts(llama(), random(llama()), IDS, layers=torch.tensor([2])),
    ),
    "shifts in no dtype": Bad(
        equiv.ArgumentError,
        ("`dtype`", "None", "pass `dtype=torch.float32`"),
        lambda: equiv.shifts(llama(), random(llama()), IDS, dtype=None),  # type: ignore
    ),
    "shifts at no site": Bad(
        equiv.SiteError,
        ("at least one site",),
        lambda: equiv.shifts(llama(), random(llama()), IDS, sites=()),
    ),
    "a shift without its site": Bad(
        equiv.SiteError,
        ("(layer, site)", "got 0"),
        lambda: equiv.shifts(net(), one(), torch.ones(5, 3))[0],  # type: ignore[index]
    ),
    "steering that is no mapping": Bad(
        equiv.ArgumentError,
        ("`steering`", "mapping", "list"),
        lambda: steered(net(), [Vector(torch.ones(4))]),
    ),
    "steering without a layer": Bad(
        equiv.SiteError,
        ("(layer, site)", "got '0'"),
        lambda: steered(net(), {"0": Vector(torch.ones(4))}),
    ),
    "steering that is no function": Bad(
        equiv.ArgumentError,
        ("Expected a steering at (0, '0')", "Tensor"),
        lambda: steered(net(), {(0, "0"): torch.ones(4)}),
    ),
    "a vector of another width": Bad(
        equiv.ArgumentError,
        ("(0, '0')", "(5, 4)", "got (5, 3)"),
        lambda: steered(net(), {(0, "0"): Vector(torch.ones(3))}),
    ),
    "steering of another shape": Bad(
        equiv.ArgumentError,
        ("(0, '0')", "(5, 4)", "got (4,)"),
        lambda: steered(net(), {(0, "0"): lambda h: h[0]}),
    ),
    "steering that returns nothing": Bad(
        equiv.ArgumentError,
        ("(0, '0')", "(5, 4)", "NoneType"),
        lambda: steered(net(), {(0, "0"): lambda h: None}),
    ),
    "a fit on arrays": Bad(
        equiv.ArgumentError,
        ("`base`", "floating tensor", "float64", "torch.as_tensor"),
        lambda: equiv.fit(np.ones((4, 3)), torch.ones(4, 3)),  # type: ignore[arg-type]
    ),
    "a fit on integers": Bad(
        equiv.ArgumentError,
        ("`exact`", "floating tensor", "torch.int64"),
        lambda: equiv.fit(torch.ones(4, 3), torch.ones(4, 3).long()),
    ),
    "a fit on NaN": Bad(
        equiv.ArgumentError,
        ("finite", "`exact`", "12 NaN"),
        lambda: equiv.fit(torch.ones(4, 3), torch.full((4, 3), torch.nan)),
    ),
    "a fit of a broken rank": Bad(
        equiv.ArgumentError,
        ("`rank`", "1.5"),
        lambda: equiv.fit(torch.ones(4, 3), torch.ones(4, 3), rank=1.5),  # type: ignore
    ),
    "a negative ridge": Bad(
        equiv.ArgumentError,
        ("`ridge`", "finite number >= 0", "-1"),
        lambda: equiv.fit(torch.ones(4, 3), torch.ones(4, 3), ridge=-1),
    ),
    "a mask of another length": Bad(
        equiv.ArgumentError,
        ("mask of shape (4,)", "(3,)"),
        lambda: equiv.fit(torch.ones(4, 3), torch.ones(4, 3), mask=[1, 1, 0]),
    ),
    "a sequential fit of a layer that is not there": Bad(
        equiv.SiteError,
        ("0…1", "[7]"),
        lambda: equiv.fit_sequential(llama(), random(llama()), IDS, layers=[7]),
    ),
    "a sequential fit of rank zero": Bad(
        equiv.ArgumentError,
        ("`rank`", "0"),
        lambda: equiv.fit_sequential(llama(), random(llama()), IDS, rank=0),
    ),
    "a sequential fit in half precision": Bad(
        equiv.ArgumentError,
        ("`dtype`", "torch.float16", "too coarse"),
        lambda: equiv.fit_sequential(
            llama(), random(llama()), IDS, dtype=torch.float16
        ),
    ),
    "a sequential fit on no inputs": Bad(
        equiv.InputsError,
        ("Expected `inputs`", "NoneType"),
        lambda: equiv.fit_sequential(llama(), random(llama()), None),
    ),
    "a difference from a name": Bad(
        equiv.UpdateError,
        ("`tuned`", "torch.nn.Module", "str"),
        lambda: equiv.Update.between(net(), "x"),  # type: ignore[arg-type]
    ),
    "an update from a list": Bad(
        equiv.UpdateError,
        ("mapping of parameter name", "list"),
        lambda: equiv.Update.from_dict([1]),  # type: ignore[arg-type]
    ),
    "an adapter that is none": Bad(
        equiv.UpdateError,
        ("`PeftModel`", "Sequential", "Update.between"),
        lambda: equiv.Update.from_peft(net()),  # type: ignore[arg-type]
    ),
    "a random update of no size": Bad(
        equiv.ArgumentError,
        ("`relative_norm`", "finite number > 0", "0.0"),
        lambda: equiv.Update.random(net(), 0.0, seed=0),
    ),
    "a random update without a seed": Bad(
        equiv.ArgumentError,
        ("`seed`", "None"),
        lambda: equiv.Update.random(net(), 0.1, seed=None),  # type: ignore[arg-type]
    ),
    "an update times NaN": Bad(
        equiv.ArgumentError,
        ("`t`", "finite number", "nan"),
        lambda: random(net()).scaled(float("nan")),
    ),
    "an update times a word": Bad(
        equiv.ArgumentError,
        ("`t`", "finite number", "'2'"),
        lambda: random(net()).scaled("2"),  # type: ignore[arg-type]
    ),
    "a sparse update": Bad(
        equiv.UpdateError,
        ("dense tensor for `0.weight`", "torch.sparse_coo", ".to_dense()"),
        lambda: equiv.check(net(), {"0.weight": torch.ones(4, 3).to_sparse()}),
    ),
}


def _with(value: float) -> torch.Tensor:
    delta = torch.ones(4, 3)
    delta[1, 2] = value
    return delta


def _rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2))


@pytest.mark.parametrize("name", TABLE)
def test_bad_call(name: str) -> None:
    bad = TABLE[name]
    with pytest.raises(bad.error) as caught:
        bad.call()
    message = str(caught.value)
    missing = [part for part in bad.says if part not in message]
    assert not missing, message
    assert isinstance(caught.value, equiv.EquivError)
    assert len(message) < 600 and message.endswith((".", ")", "?")), message


def test_another_device_is_named() -> None:
    """A CUDA device is not needed: `fitted` compares device types."""
    from equiv.errors import UpdateMismatchError
    from equiv.update.fitting import fitted

    model = net()
    update = equiv.Update(
        {"0.weight": torch.ones(4, 3, device="meta")}, {}, "elsewhere"
    )
    with pytest.raises(UpdateMismatchError, match=r"on meta, the model on cpu.*\.to\("):
        fitted(update, model)


def test_frozen_weights_can_be_updated() -> None:
    model = net().requires_grad_(False)
    assert equiv.check(model, random(model).scaled(0.1)).derivative_holds
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tied_weight_given_once_or_twice_alike_is_right() -> None:
    model = Tied()
    delta = 0.01 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    once = equiv.check(model, {"a.weight": delta})
    other = equiv.check(model, {"b.weight": delta})
    both = equiv.check(model, {"a.weight": delta, "b.weight": delta})
    assert once.derivative_holds
    assert once.rows == other.rows == both.rows


def test_arguments_of_any_integer_type() -> None:
    model = llama()
    update = random(model)
    expected = equiv.shifts(model, update, IDS)[1, "mlp_in"].exact
    forms = ([1], range(1, 2), np.array([1]), torch.tensor([1, 1]), iter([1]))
    for layers in forms:
        s = equiv.shifts(model, update, IDS, layers=layers)
        assert torch.equal(s[np.int64(1), "mlp_in"].exact, expected)  # type: ignore
        with pytest.raises(equiv.SiteError, match=r"\[1\]"):
            s[0, "mlp_in"]
    report = equiv.check(model, update, IDS, rank=np.int64(2), layers=np.array([1]))  # type: ignore
    assert report.subject.rank == 2 and {r.layer for r in report.rows} == {1, 2}
    fitted = equiv.fit(torch.randn(9, 3), torch.randn(9, 3), rank=np.int32(1))  # type: ignore
    assert fitted.num_parameters == 9


def test_names_given_twice_count_once() -> None:
    model = llama()
    update = random(model)
    report = equiv.check(
        model, update, IDS, sites=["mlp_in", "mlp_in"], forms=["vector", "vector"]
    )
    once = equiv.check(model, update, IDS, sites=["mlp_in"], forms=["vector"])
    assert report.rows == once.rows and report.fits == once.fits


def test_what_is_shown_is_short() -> None:
    model = llama()
    update = random(model)
    shown = repr(equiv.shifts(model, update, IDS))
    assert shown.startswith("Shifts(LlamaForCausalLM, random update")
    assert "layers [0, 1]" in shown and "2 sequences" in shown
    assert repr(update).startswith("Update(random update, relative norm 0.1, seed 0: ")
    assert f"{len(update.deltas)} parameters, norm " in repr(update)
    assert len(repr(update)) < 100


def test_adapted_models_are_steered() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama(), config)
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        with equiv.steer(adapted, {(1, "block_out"): Vector(torch.ones(16))}):
            steered = adapted(input_ids=IDS).logits
        after = adapted(input_ids=IDS).logits
    assert not torch.allclose(steered, before)
    assert torch.equal(after, before)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("offset", [0.3, 1e4])
def test_no_map_comes_out_of_rounding(offset: float, ridge: float) -> None:
    """Constant activations have no variance: what is left of it is rounding."""
    source = torch.Generator().manual_seed(0)
    shift = torch.randn(5000, 6, generator=source, dtype=torch.float64)
    h = (offset * torch.randn(1, 6, generator=source)).expand(5000, 6)
    fitted = equiv.fit(h, shift, ridge=ridge, rank=None)
    assert isinstance(fitted, Affine) and not (fitted.up @ fitted.down).any()
    torch.testing.assert_close(fitted.bias, shift.mean(0))
    # With variance in it the fit is the least-squares solution, as ever.
    x = h.double() + torch.randn(5000, 6, generator=source, dtype=torch.float64)
    fitted = equiv.fit(x, x @ torch.ones(6, 6).double(), ridge=0.0, rank=None)
    assert isinstance(fitted, Affine)
    expected = torch.ones(6, 6, dtype=torch.float64)
    torch.testing.assert_close(fitted.up @ fitted.down, expected, rtol=1e-5, atol=1e-5)
