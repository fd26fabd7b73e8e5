"""The gate: right merges pass, wrong ones are caught, located and named."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import equiv
from equiv.demo import loading
from equiv.gate.rounding import half_ulp, weight_bound
from equiv.gate.values import Fate
from equiv.steering.forms.vector import Vector
from equiv.testing.models import FAMILIES, transformer
from equiv.update.low_rank import LowRank

IDS = torch.randint(3, 32, (6, 10), generator=torch.Generator().manual_seed(0))
Change = Callable[[str, Tensor], Tensor]


def base_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return transformer(family, seed=1, dtype=dtype, tie_word_embeddings=False)


def lora(model: Any, size: float = 0.1, seed: int = 0) -> equiv.Update:
    """Rank 2 on every matrix of the blocks, each `size` times its weight."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and any(part.isdigit() for part in name.split(".")):
            left, right = (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in ((weight.shape[0], 2), (2, weight.shape[1]))
            )
            made = LowRank(left, right)
            scale = size * float(weight.detach().norm()) / float(made.norm())
            deltas[name] = made.scaled(scale)
    return equiv.Update.from_dict(deltas)


def merged(model: Any, update: equiv.Update, change: Change, dtype: torch.dtype) -> Any:
    """W + change(ΔW), rounded once to a dtype, by plain tensors."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in update.deltas:
                delta = update.deltas[name]
                assert isinstance(delta, LowRank)
                total = parameter.double() + change(name, delta.left @ delta.right)
                parameter.data = total.to(dtype)
            else:
                parameter.data = parameter.data.to(dtype)
    return made


def in_layer(layer: int, one: Change, other: Change = lambda _, d: d) -> Change:
    return lambda n, d: (one if f".{layer}." in n else other)(n, d)


def transposed(_: str, delta: Tensor) -> Tensor:
    return delta.T if delta.shape[0] == delta.shape[1] else delta


FAULTS: dict[str, tuple[Change, str]] = {
    "not applied": (lambda _, d: 0 * d, "every layer not applied"),
    "twice": (lambda _, d: 2 * d, "every layer applied twice"),
    "flipped": (lambda _, d: -d, "every layer"),
    "scale 15/16": (lambda _, d: 15 / 16 * d, "every layer applied times 0.9"),
    "layer 1 skipped": (in_layer(1, lambda _, d: 0 * d), "layer 1 not applied"),
    "layer 0 twice": (in_layer(0, lambda _, d: 2 * d), "layer 0 applied twice"),
    "values skipped": (
        lambda n, d: 0 * d if "v_proj" in n else d,
        "v_proj not applied",
    ),
    "transposed": (transposed, "transposed"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_merge_is_the_same(family: str, dtype: torch.dtype) -> None:
    model = base_model(family, dtype)
    for size in (0.001, 0.1):
        update = lora(model, size)
        right = merged(model, update, lambda _, d: d, dtype)
        found = equiv.compare(right, (model, update))
        assert found.same, found.reason
        assert found.compared == len(dict(model.named_parameters()))
        assert equiv.diagnose(model, update, right).applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_caught_and_named(fault: str, dtype: torch.dtype) -> None:
    model = base_model(dtype=dtype)
    update = lora(model)
    change, says = FAULTS[fault]
    wrong = merged(model, update, change, dtype)
    with pytest.raises(equiv.NotSameError) as caught:
        equiv.assert_same(wrong, (model, update))
    message = str(caught.value)
    assert says in message and "\n" not in message
    assert isinstance(caught.value, AssertionError)
    truly = {
        name
        for name, delta in update.deltas.items()
        if not torch.equal(change(name, delta.dense()), delta.dense())  # type: ignore[union-attr]
    }
    assert {row.name for row in equiv.compare(wrong, (model, update)).weights} == truly


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_outputs_are_told_from_logits_alone(fault: str) -> None:
    """Coefficients are those that were applied, to many digits, however large."""
    model = base_model(dtype=torch.float64)
    update = lora(model, 0.05)
    change, says = FAULTS[fault]
    wrong = merged(model, update, change, torch.float64)

    def ask(ids: Tensor) -> Tensor:
        return wrong(ids).logits

    found = equiv.diagnose(model, update, ask, IDS)
    assert found.evidence == "outputs" and not found.applied
    assert says in found.looks_like
    with pytest.raises(equiv.NotSameError, match=says):
        equiv.assert_same(ask, (model, update), IDS)
    for i, share in enumerate(found.layers):
        ones = {n: change(n, torch.eye(2)) for n in update.deltas if f".{i}." in n}
        applied = {float(d[0, 0]) for d in ones.values()}
        if len(applied) == 1 and fault != "transposed":
            # 1e-5: outside the library the families' norms round to float32.
            assert share.coefficient == pytest.approx(applied.pop(), abs=1e-5)


def test_a_right_model_that_only_answers_passes() -> None:
    model = base_model()
    update = lora(model, 0.05)
    right = merged(model, update, lambda _, d: d, torch.float32)
    equiv.assert_same(lambda ids: right(ids).logits, (model, update), IDS)
    found = equiv.diagnose(model, update, lambda ids: right(ids).logits, IDS)
    assert found.applied and found.looks_like == "applied in every layer"
    assert found.explained == pytest.approx(1, abs=1e-6)


def test_storing_in_bfloat16_is_no_fault_of_the_merge() -> None:
    """The standard errors hold what rounding the weights does to the shares."""
    for seed in range(5):
        model = base_model()
        update = lora(model, 0.1, seed)
        half = merged(model, update, lambda _, d: d, torch.bfloat16)

        def ask(ids: Tensor, half: Any = half) -> Tensor:
            return half(ids).logits

        found = equiv.diagnose(model, update, ask, IDS)
        assert found.applied, str(found)
        assert any(share.uncertainty > 1e-4 for share in found.layers)  # type: ignore[operator]


def test_likeliest_tokens_are_enough() -> None:
    model = base_model(dtype=torch.float64)
    update = lora(model, 0.05)
    wrong = merged(model, update, in_layer(1, lambda _, d: 0.5 * d), torch.float64)

    def top(ids: Tensor) -> equiv.TopK:
        shares = torch.log_softmax(wrong(ids).logits, -1).detach().topk(5)
        return equiv.TopK(shares.indices, shares.values)

    found = equiv.diagnose(model, update, top, IDS)
    assert [s.coefficient for s in found.layers] == pytest.approx([1, 0.5], abs=1e-3)
    assert found.looks_like == "layer 1 applied times 0.5"
    with pytest.raises(equiv.NotSameError, match=r"layer 1 applied times 0\.5"):
        equiv.assert_same(top, (model, update), IDS)


def test_what_outputs_do_not_show_is_said_to_be_unknown() -> None:
    """At one token attention is the token itself: queries and keys do nothing."""
    model = base_model(dtype=torch.float64)
    deltas = lora(model, 0.05).deltas
    update = equiv.Update.from_dict(
        {n: d for n, d in deltas.items() if "q_proj" in n or "up_proj" in n}
    )
    found = equiv.diagnose(
        model, update, lambda ids: model(ids).logits, torch.tensor([[5], [9], [11]])
    )
    kinds = {share.part: share for share in found.kinds}
    assert kinds["q_proj"].fate is Fate.NOT_IDENTIFIABLE
    assert kinds["q_proj"].coefficient is None
    assert kinds["up_proj"].fate is Fate.NOT_APPLIED


def test_a_shift_by_one_layer_is_named() -> None:
    model = base_model()
    update = lora(model)
    moved = copy.deepcopy(model)
    first, second = moved.model.layers
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        a.data, b.data = b.data, a.data
    found = equiv.compare(moved, model)
    stories = {row.looks_like for row in found.weights}
    assert stories == {"the matrix of layer 0", "the matrix of layer 1"}
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in update.deltas.items():
            other = name.replace(".0.", ".x.").replace(".1.", ".0.").replace("x", "1")
            wrong.get_parameter(other).add_(delta.dense())  # type: ignore[union-attr]
    found = equiv.compare(wrong, (model, update))
    assert {row.looks_like for row in found.weights} == {
        "given the difference of layer 0",
        "given the difference of layer 1",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_on_reload_is_named(dtype: torch.dtype) -> None:
    model = base_model()
    rounded = copy.deepcopy(model).to(dtype).float()
    found = equiv.compare(rounded, model)
    assert not found.same
    name = str(dtype).removeprefix("torch.")
    assert found.looks_like == f"rounded to {name}"
    equiv.assert_same(
        copy.deepcopy(model).to(dtype), model
    )  # stored so: to its rounding


def test_a_tied_embedding_edited_once_is_caught() -> None:
    tied = transformer("llama", seed=1, dtype=torch.float32, tie_word_embeddings=True)
    update = equiv.Update.random(tied, 0.1, seed=0).restricted(names="*embed*")
    once = base_model()
    once.load_state_dict(tied.state_dict())
    delta = update.deltas["model.embed_tokens.weight"]
    assert isinstance(delta, Tensor)
    with torch.no_grad():
        once.model.embed_tokens.weight.add_(delta)
    found = equiv.compare(once, (tied, update))
    assert [row.name for row in found.weights] == ["lm_head.weight"]
    assert found.weights[0].looks_like == "not applied"


def test_parameters_on_one_side_only_are_named() -> None:
    model = base_model()
    other = transformer("llama", seed=1, dtype=torch.float32, num_hidden_layers=1)
    found = equiv.compare(other, model)
    assert not found.same and found.only_expected
    assert "only the expected side has `model.layers.1." in found.reason


STEERING = {(0, "block_out"): Vector(torch.linspace(-1, 1, 16))}


def steered(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad(), equiv.steer(model, STEERING):
        return model(ids).logits


def test_right_steering_passes() -> None:
    model = base_model()
    equiv.assert_same(lambda ids: steered(model, ids), (model, STEERING), IDS)


def partly(model: Any, keep: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Outputs that are steered at some tokens only."""

    def ask(ids: Tensor) -> Tensor:
        mask = keep(torch.ones_like(ids))[..., None].bool()
        with torch.no_grad():
            return torch.where(mask, steered(model, ids), model(ids).logits)

    return ask


def only_row_0(ones: Tensor) -> Tensor:
    return torch.cat([ones[:1], 0 * ones[1:]])


def only_prompt(ones: Tensor) -> Tensor:
    return torch.cat([ones[:, :6], 0 * ones[:, 6:]], 1)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (only_row_0, "not steered in any row of a batch but the first"),
        (only_prompt, "not steered from position 6 on"),
        (lambda ones: 0 * ones, "not steered anywhere"),
    ],
)
def test_missing_steering_is_located(
    keep: Callable[[Tensor], Tensor], says: str
) -> None:
    model = base_model()
    with pytest.raises(equiv.NotSameError, match=says):
        equiv.assert_same(partly(model, keep), (model, STEERING), IDS)


def test_the_strength_of_steering_is_told() -> None:
    model = base_model()
    weak = {key: value.scaled(0.6) for key, value in STEERING.items()}

    def ask(ids: Tensor) -> Tensor:
        with torch.no_grad(), equiv.steer(model, weak):
            return model(ids).logits

    with pytest.raises(equiv.NotSameError, match=r"steered with 0\.6 times"):
        equiv.assert_same(ask, (model, STEERING), IDS)


def test_bounds_are_those_of_rounding() -> None:
    """Against torch's own rounding of a million numbers, in every dtype."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.randn(10**6, generator=generator, dtype=torch.float64)
        values = values * 2.0 ** torch.randint(-8, 8, (10**6,), generator=generator)
        apart = (values.to(dtype).double() - values).abs()
        bound = half_ulp(values, dtype)
        assert bool((apart <= bound).all())
        assert float((apart / bound).max()) > 0.99  # and no looser than it must be


def test_bounds_hold_merges_in_low_precision() -> None:
    """Factors multiplied, scaled and added in bfloat16, rounded after every step."""
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((64, 48), (64, 4), (4, 48))
    )
    for scale in (0.003, 0.1, 1.7):
        product = (up.float() @ down.float()).bfloat16()
        stored = weight + product * scale
        delta = (up.double() @ down.double()) * scale
        exact = weight.double() + delta
        bound = weight_bound(exact, delta, torch.bfloat16)
        # Three roundings of ΔW compound: (1 + u)³ − 1 < 3u + 4u².
        assert bool(((stored.double() - exact).abs() <= bound * (1 + 2**-6)).all())


def test_tolerances_can_be_given() -> None:
    model = base_model()
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-4)
    assert not equiv.compare(near, model).same
    equiv.assert_same(near, model, rtol=1.1e-4)
    equiv.assert_same(near, model, IDS, rtol=1e-2)
    with pytest.raises(equiv.NotSameError, match="rtol=1e-06"):
        equiv.assert_same(near, model, rtol=1e-6)
    with pytest.raises(equiv.ArgumentError, match="`rtol`"):
        equiv.assert_same(near, model, rtol=-1)


def wide(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, 40)


def broken(ids: Tensor) -> Tensor:
    logits = torch.zeros(*ids.shape, 32)
    logits[2, 3, 4] = float("nan")
    return logits


def short(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 3, 32)


def far(ids: Tensor) -> equiv.TopK:
    return equiv.TopK(
        torch.full((*ids.shape, 2), 99), torch.full((*ids.shape, 2), -1.0)
    )


def positive(ids: Tensor) -> equiv.TopK:
    return equiv.TopK(torch.zeros(*ids.shape, 2).long(), torch.ones(*ids.shape, 2))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (wide, "different vocabularies: 40 and 32"),
        (broken, "1 outputs are NaN or infinite, the first for sequence 2, position 3"),
        (short, r"expected logits of shape \[6, 10, vocab\]"),
        (far, "id 99, beyond the 32"),
        (positive, "natural log-probabilities"),
        (lambda ids: "yes", "got str"),
    ],
)
def test_answers_that_cannot_be_compared(ask: Any, says: str) -> None:
    with pytest.raises(equiv.OutputsError, match=says):
        equiv.assert_same(ask, base_model(), IDS)


def test_wrong_sides_are_refused() -> None:
    model = base_model()
    for actual in (3, (model, 3), (3, model), None):
        with pytest.raises(equiv.EquivError, match="Expected"):
            equiv.assert_same(actual, model)
    with pytest.raises(equiv.ArgumentError, match=r"Expected `rtol=`"):
        equiv.assert_same(lambda i: model(i).logits, lambda i: model(i).logits, IDS)
    with pytest.raises(equiv.ArgumentError, match=r"token ids \[batch, seq\]"):
        equiv.assert_same(lambda i: model(i).logits, lambda i: model(i).logits, rtol=1)


def test_models_come_back_untouched() -> None:
    model = base_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update = lora(model)
    equiv.diagnose(model, update, lambda ids: model(ids).logits, IDS)
    equiv.compare(model, (model, update), IDS)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_merges_rightly_in_any_dtype(dtype: torch.dtype) -> None:
    """Its product of factors is summed in float32, and terms of it cancel."""
    peft = pytest.importorskip("peft")
    base: Any = loading.load_base()
    inner: Any = loading.load_base()
    base, inner = base.to(dtype), inner.to(dtype)
    right = peft.PeftModel.from_pretrained(inner, loading.LORA).merge_and_unload()
    found = equiv.compare(right, (base, str(loading.LORA)))
    assert found.same, found.reason
    assert equiv.diagnose(base, str(loading.LORA), right).applied


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_tied_models_are_compared_by_outputs_too(family: str) -> None:
    model = transformer(family, seed=1, dtype=torch.float32, tie_word_embeddings=True)
    update = lora(model, 0.05)
    right = merged(model, update, lambda _, d: d, torch.float32)
    twice = merged(model, update, lambda _, d: 2 * d, torch.float32)
    equiv.assert_same(lambda ids: right(ids).logits, (model, update), IDS)
    found = equiv.diagnose(model, update, lambda ids: twice(ids).logits, IDS)
    assert found.looks_like == "every layer applied twice"


def test_the_base_may_be_the_one_that_peft_wrapped() -> None:
    """Its layers then have other names, and the adapter's beside them."""
    peft = pytest.importorskip("peft")
    base = base_model()
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3)
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    right = copy.deepcopy(adapted).merge_and_unload()
    equiv.assert_same(right, (base, adapted))
    assert equiv.diagnose(base, adapted, right).applied
    adapted.train()
    equiv.assert_same(adapted, (base, adapted), IDS)  # without its dropout
    assert adapted.training


def test_sides_may_be_swapped() -> None:
    model = base_model(dtype=torch.bfloat16)
    update = lora(model)
    stored = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in update.deltas.items():
            rounded = delta.dense().bfloat16()  # type: ignore[union-attr]
            stored.get_parameter(name).add_(rounded)
    equiv.assert_same(stored, (model, update))
    equiv.assert_same((model, update), stored)


def test_a_base_rounded_before_the_merge_is_right() -> None:
    """As `from_pretrained(dtype=bfloat16)` and a merge leave it."""
    model = base_model()
    update = lora(model)
    half = copy.deepcopy(model).bfloat16()
    right = merged(half, update, lambda _, d: d, torch.bfloat16)
    equiv.assert_same(right, (model, update))


def test_outputs_that_cannot_show_an_update_decide_nothing() -> None:
    model = base_model(dtype=torch.bfloat16)
    update = lora(model, 1e-3)
    found = equiv.compare(lambda ids: model(ids).logits, (model, update), IDS)
    assert not found.same
    assert found.reason.startswith("not decided: the update moves these outputs by")
    with pytest.raises(equiv.NotSameError, match="not decided"):
        equiv.assert_same(lambda ids: model(ids).logits, (model, update), IDS)


def test_one_row_gives_no_false_certainty() -> None:
    """Something else in the outputs: shares stay within four standard errors of 1."""
    model = base_model(dtype=torch.float64)
    update = lora(model, 0.05)
    far = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        made = merged(model, update, lambda _, d: d, torch.float64)
        noise = torch.randn(made.lm_head.weight.shape, generator=generator)
        made.lm_head.weight.data += 0.003 * noise
        ids = torch.randint(3, 32, (1, 24), generator=generator)

        def ask(rows: Tensor, made: Any = made) -> Tensor:
            return made(rows).logits

        for share in equiv.diagnose(model, update, ask, ids).layers:
            assert share.coefficient is None or share.uncertainty is not None
            if share.coefficient is not None and share.uncertainty is not None:
                far += abs(share.coefficient - 1) > 4 * share.uncertainty
    assert far <= 1


def test_a_matrix_of_another_shape_is_named() -> None:
    model = base_model("gpt2")
    update = lora(model)
    wrong = merged(model, update, lambda _, d: d, torch.float32)
    weight = wrong.transformer.h[0].mlp.c_fc.weight
    weight.data = weight.data.T.contiguous()
    found = equiv.compare(wrong, (model, update))
    assert [row.looks_like for row in found.weights] == [
        "of shape (24, 16), expected (16, 24)"
    ]
    assert not equiv.diagnose(model, update, wrong).applied


def test_buffers_and_settings_are_part_of_a_model() -> None:
    model = base_model()
    turned = transformer(
        "llama",
        seed=1,
        dtype=torch.float32,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    found = equiv.compare(turned, model)
    assert not found.same
    assert all("inv_freq" in row.name for row in found.weights)
    assert "rope" in found.settings[0]
    other = base_model()
    other.config.hidden_act = "relu"
    found = equiv.compare(other, model)
    assert found.settings == ("hidden_act 'relu', expected 'silu'",)
    assert "another setting: hidden_act" in found.reason
    other = base_model(dtype=torch.bfloat16)
    other.config.use_cache = not model.config.use_cache
    other.config.name_or_path = "elsewhere"
    equiv.assert_same(other, base_model(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"inputs_embeds": torch.ones(2, 3, 16)}, r"token ids.*inputs_embeds"),
        (torch.ones(2, 3, 16), r"token ids.*inputs_embeds"),
    ],
)
def test_outputs_are_compared_on_token_ids(inputs: Any, says: str) -> None:
    model = base_model()
    with pytest.raises(equiv.ArgumentError, match=says):
        equiv.assert_same(lambda ids: model(ids).logits, model, inputs)


def test_uncertain_shares_are_not_called_applied() -> None:
    from equiv.gate.fates import share_of

    for coefficient, error in ((0.05, 0.24), (0.3, 0.2), (0.45, 0.13)):
        share = share_of("layer 0", coefficient, error)
        assert share.fate is Fate.NOT_IDENTIFIABLE
    assert share_of("layer 0", 0.4, 0.12).fate is Fate.NOT_APPLIED
    assert share_of("layer 0", 0.6, 0.12).fate is Fate.APPLIED


def test_equal_entries_that_round_alike_are_no_lean() -> None:
    """A norm of ones, all of them moved by one number: 4096 times the same rounding."""

    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))

    for step in range(40):
        model, moved = Scale(), Scale()
        delta = torch.full((4096,), 0.001 + 0.0007 * step)
        with torch.no_grad():
            moved.weight.copy_(model.weight + delta.bfloat16())
        found = equiv.compare(moved, (model, {"weight": delta}))
        assert found.same, found.reason
