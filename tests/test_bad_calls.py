"""Wrong calls fail at the door, with a message that says what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import equiv
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
        lambda: equiv.check(net(), {"0.weight": [1.0]}),
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
        lambda: equiv.check(net(), 3),
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
    "a family that is not in the table": Bad(
        equiv.UnsupportedModelError,
        ("OPTForCausalLM", "FAMILIES", "llama"),
        lambda: equiv.check(_opt(), {"lm_head.weight": torch.ones(9, 8)}, IDS),
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
        ("attn_out, mlp_in, mlp_out, block_out", "resid"),
        lambda: equiv.check(llama(), random(llama()), IDS, sites=("resid",)),
    ),
    "a submodule that is not there": Bad(
        equiv.SiteError,
        ("Expected sites among 0, 1, 2", "'7'"),
        lambda: equiv.check(net(), one(), torch.ones(5, 3), sites=("7",)),
    ),
    "a string of sites": Bad(
        equiv.ArgumentError,
        ("tuples of names",),
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
        ("`target`", "block, site"),
        lambda: equiv.check(net(), one(), target="logits"),
    ),
    "a point that is not there": Bad(
        equiv.ArgumentError,
        ("`at`", "both, base, midpoint"),
        lambda: equiv.check(net(), one(), at="end"),
    ),
    "a negative threshold": Bad(
        equiv.ArgumentError,
        ("`max_remainder` >= 0",),
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
        ("one shape", "(2, 3, 4)", "(2, 3, 5)"),
        lambda: equiv.fit(torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
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
}


def _with(value: float) -> torch.Tensor:
    delta = torch.ones(4, 3)
    delta[1, 2] = value
    return delta


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=9,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=8,
            word_embed_proj_dim=8,
        )
    )


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
