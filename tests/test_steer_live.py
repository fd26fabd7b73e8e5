"""Steering beside other things on a live model: hooks, PEFT, compilers, devices, tools.

Everywhere: what is steered is what plain steering of a plain model gives, and nothing
is left behind.
"""

import copy
import gc
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import witness
from steered import CASES, IDS, MASK, llama, random, rotation, run, steering, unchanged
from torch import Tensor, nn

import equiv
from equiv import Affine, ArgumentError, LoReFT, Vector
from equiv.steering.applying.placed import Placed
from equiv.testing.models import transformer


@torch.no_grad()
def test_other_hooks_stay_and_see_the_steered_model() -> None:
    """Theirs run in the order in which they came, and ours among them."""
    model, calls = llama(), []

    def note(name: str) -> Any:
        return lambda _m, _a, out: calls.append((name, out.clone()))

    block = model.model.layers[0]
    for name in ("first", "second"):
        block.register_forward_hook(note(name))
    before = run(model)
    with unchanged(model), equiv.steer(model, {(0, "block_out"): Vector(random(16))}):
        handle = block.register_forward_hook(note("third"))
        calls.clear()
        run(model)
        handle.remove()
        assert [name for name, _ in calls] == ["first", "second", "third"]
        assert torch.equal(calls[0][1], calls[1][1])
        torch.testing.assert_close(calls[2][1], calls[1][1] + random(16))
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "olmo2"])
@pytest.mark.parametrize("asked_before", [False, True])
@torch.no_grad()
def test_hidden_states_are_the_steered_ones(family: str, asked_before: bool) -> None:
    """Transformers puts hooks that record them on the blocks at the first request."""
    model = transformer(family)
    v = random(16).double()
    if asked_before:
        model(input_ids=IDS, output_hidden_states=True)
    with unchanged(model) if asked_before else ExitStack():
        plain = copy.deepcopy(model)(input_ids=IDS, output_hidden_states=True)
        with equiv.steer(model, {(0, "block_out"): Vector(v)}):
            found = model(input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(
        found.hidden_states[1] - plain.hidden_states[1], v.expand(2, 5, 16)
    )


@torch.no_grad()
def test_steers_inside_one_another() -> None:
    """The inner one reads what the outer one has made, whoever ends first."""
    model = llama(torch.float64)
    up, v = random(16, 2).double(), random(16).double()
    inner = {(0, "block_out"): Affine(random(2, 16, seed=1).double(), up)}
    outer = {(0, "block_out"): Vector(v)}
    before = run(model)

    def both(h: Tensor) -> Tensor:
        return v + inner[0, "block_out"](h + v)

    with equiv.steer(model, {(0, "block_out"): both}):  # type: ignore[dict-item]
        expected = run(model)
    with unchanged(model):
        with equiv.steer(model, outer), equiv.steer(model, inner):
            torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)
        with equiv.steer(model, outer, positions="first 1"):
            with equiv.steer(model, [{}], index=[-1, -1], positions="last"):
                kept = run(model)
            assert torch.equal(run(model), kept)
        first, second = ExitStack(), ExitStack()
        first.enter_context(equiv.steer(model, outer, positions="last"))
        second.enter_context(equiv.steer(model, inner, positions="prompt"))
        first.close()
        with equiv.steer(copy.deepcopy(model), {}), ExitStack() as alone:
            second.close()
            assert torch.equal(run(model), before)
            alone.enter_context(equiv.steer(model, inner, positions="prompt"))


@torch.no_grad()
def test_nothing_is_left_behind_whatever_happens() -> None:
    model = llama()
    before = run(model)

    def fails(h: Tensor) -> Tensor:
        raise KeyError("mine")

    with unchanged(model):
        for steers, how in CASES.values():
            with (
                pytest.raises(RuntimeError, match="stop"),
                equiv.steer(model, steers, **how),
            ):
                run(model)
                raise RuntimeError("stop")
        with (
            pytest.raises(KeyError, match="mine"),
            equiv.steer(model, {(0, "mlp_in"): fails}, positions="last"),  # type: ignore[dict-item]
        ):
            model.generate(IDS, attention_mask=MASK, pad_token_id=0, max_new_tokens=2)
        wrong: list[Any] = [
            {(0, "nowhere"): Vector(random(16))},
            {(9, "mlp_in"): fails},
        ]
        for bad in wrong:
            with (
                pytest.raises(equiv.SiteError),
                equiv.steer(model, {**steering(), **bad}, positions="last"),
            ):
                pass
    assert torch.equal(run(model), before)


@torch.no_grad()
def test_no_activation_is_held_after_a_forward() -> None:
    model, alive = llama(), []
    with equiv.steer(model, steering()):
        handle = model.model.layers[1].mlp.register_forward_hook(
            lambda _m, _a, out: alive.append(weakref.ref(out))
        )
        run(model)
        handle.remove()
        gc.collect()
        assert [ref() for ref in alive] == [None]


@torch.no_grad()
def test_a_copy_of_a_steered_model_is_another_model() -> None:
    """Its modules are its own: changing the original's weights does not reach it."""
    model = llama()
    with equiv.steer(model, steering(), positions="last 2"):
        twin, expected = copy.deepcopy(model), run(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(run(twin), expected)


@pytest.mark.parametrize("positions", [None, "last 2 + generated"])
@torch.no_grad()
def test_adapted_models_are_steered(positions: str | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(llama(), config)
    merged = copy.deepcopy(adapted).merge_and_unload()
    call = {"attention_mask": MASK, "pad_token_id": 0, "max_new_tokens": 4}
    found, expected = [], []
    for model, results in ((adapted, found), (merged, expected)):
        before = run(model)
        with unchanged(model), equiv.steer(model, steering(), positions=positions):
            results += [run(model), model.generate(input_ids=IDS, **call)]
        assert torch.equal(run(model), before)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], expected[1])


@torch.no_grad()
def test_adapted_encoders_are_steered_by_position() -> None:
    """PEFT calls the `forward` of a model without a head past all of its hooks."""
    peft = pytest.importorskip("peft")
    bert = transformer("bert", dtype=torch.float32).bert
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"
    )
    adapted = peft.get_peft_model(copy.deepcopy(bert), config)  # a LoRA of zero
    steers = {(0, "block_out"): Vector(random(16))}
    with equiv.steer(adapted, steers, positions="last"):
        found = adapted(input_ids=IDS).last_hidden_state
    with equiv.steer(bert, steers, positions="last"):
        torch.testing.assert_close(found, bert(input_ids=IDS).last_hidden_state)


def test_virtual_tokens_have_no_position() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(llama(), config)
    with (
        pytest.raises(ArgumentError, match="virtual tokens"),
        equiv.steer(adapted, steering(), positions="last"),
    ):
        pass


def test_tensors_go_where_the_activations_are() -> None:
    """One copy per device and dtype, and no other."""
    affine = Affine(random(2, 4), random(4, 2), random(4))
    placed = Placed(affine, (0, "mlp_out"))
    for device in ("cpu", "meta"):
        for dtype in (torch.float32, torch.float64):
            for _ in range(2):
                shift = placed(torch.ones(3, 4, device=device, dtype=dtype))
                assert isinstance(shift, Tensor)
                assert (shift.device.type, shift.dtype) == (device, dtype)
    assert len(placed.at) == 4
    assert placed.at[torch.device("cpu"), torch.float32] == (affine, "cpu")


@torch.no_grad()
def test_a_model_without_values_is_steered_where_it_is() -> None:
    """The device is that of the hooked tensor: here one that holds no numbers."""
    model, mask = llama().to("meta"), MASK.to("meta")
    model.set_attn_implementation("eager")  # others look at the mask's values
    for steers, how in CASES.values():
        with equiv.steer(model, steers, **how):
            out = model(input_ids=IDS.to("meta"), attention_mask=mask).logits
        assert out.is_meta and out.shape == (2, 5, 32)


@torch.no_grad()
def test_a_model_whose_weights_come_and_go_is_steered() -> None:
    """Accelerate keeps weights elsewhere and brings them in by its own `forward`s."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = llama(), llama()
    model.tie_weights()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.model.layers.parameters())
    for name, (steers, how) in CASES.items():
        with equiv.steer(plain, steers, **how):
            expected = run(plain)
        with unchanged(model), equiv.steer(model, steers, **how):
            torch.testing.assert_close(run(model), expected, msg=name)


def test_a_steer_can_be_trained_while_it_is_applied() -> None:
    """Its gradient is the directional derivative; the next step sees the new values."""
    model = llama(torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    down, up, bias = (
        random(*s, seed=3).double().requires_grad_() for s in ((2, 16), (16, 2), (16,))
    )
    steers = {(0, "block_out"): Affine(down, up, bias)}
    direction = [random(*p.shape, seed=5).double() for p in (down, up, bias)]

    def loss() -> Tensor:
        return run(model).square().mean()

    with witness.own_arithmetic(), equiv.steer(model, steers, positions="last 2"):
        loss().backward()
        grads = [p.grad for p in (down, up, bias)]
        slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))  # type: ignore[operator]
        values, step = [], 1e-4
        with torch.no_grad():
            for t in (step, -2 * step):
                for p, d in zip((down, up, bias), direction, strict=True):
                    p += t * d
                values.append(float(loss()))
    # Central differences are off by step² times the curvature, some hundred here.
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_derivatives_pass_through() -> None:
    """Forward and reverse, by a steering vector, against central differences."""
    model = llama(torch.float64)
    v, direction = (random(16, seed=n).double() for n in range(2))

    def steered(v: Tensor) -> Tensor:
        edit = LoReFT(rotation().double(), v.expand(2, 16), v[:2])
        with equiv.steer(model, {(0, "block_out"): Vector(v), (1, "mlp_out"): edit}):
            return run(model)

    step = 1e-5
    with witness.own_arithmetic():
        tangent = torch.func.jvp(steered, (v,), (direction,))[1]
        out, pull = torch.func.vjp(steered, v)[:2]
        (pulled,) = pull(torch.ones_like(out))
        with torch.no_grad():
            ahead, behind = (steered(v + t * direction) for t in (step, -step))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(pulled @ direction, tangent.sum())


def test_checkpointed_gradients_are_right_or_refused() -> None:
    """Checkpoints run the inside of a block again, outside any forward of the model."""
    inside = {k: s for k, s in steering().items() if k[1] != "resid_mid"}

    def gradients(checkpointed: bool, steers: Any, positions: str) -> list[Tensor]:
        model = llama().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        with equiv.steer(model, steers, positions=positions):
            run(model).square().mean().backward()
        return [p.grad for p in model.parameters()]

    plain, again = (gradients(c, inside, "all") for c in (False, True))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    for steers, positions in ((inside, "last"), (steering(), "all")):
        with pytest.raises(
            ArgumentError, match="once more for a checkpointed gradient"
        ):
            gradients(True, steers, positions)


def test_a_loreft_can_be_trained_while_it_is_applied() -> None:
    """It is folded into one thin map, unless it is to change."""
    layer = nn.Sequential(nn.Identity())
    weight = random(2, 16).requires_grad_()
    steers = {(0, "0"): LoReFT(rotation(), weight, random(2))}
    x = random(3, 16)
    with equiv.steer(layer, steers):
        for _ in range(2):
            layer(x).sum().backward()
            with torch.no_grad():
                weight += 1
        torch.testing.assert_close(layer(x), x + steers[0, "0"](x))


def test_what_inference_mode_has_seen_can_be_trained_with() -> None:
    layer, x = nn.Sequential(nn.Identity()), random(3, 16).double().requires_grad_()
    with equiv.steer(layer, {(0, "0"): Affine(random(2, 16), random(16, 2))}):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert x.grad is not None


def test_wrong_calls_say_what_to_do() -> None:
    model, net = llama(), nn.Sequential(nn.Linear(4, 4))
    one = {(0, "mlp_out"): Vector(random(16))}
    own = {(0, "0"): Vector(random(4))}
    told: list[tuple[nn.Module, Any, dict[str, Any], str]] = [
        (model, [one], {}, "with `index` a sequence of these, got list"),
        (model, one, {"index": [0, 0]}, "a sequence that `index` chooses from"),
        (model, [one], {"index": [0, 1]}, r"`index` within −1…0"),
        (model, [one], {"index": "ab"}, "`index` to be integers"),
        (model, one, {"positions": "middle"}, "Expected `positions` in all, prompt"),
        (model, one, {"positions": torch.ones(2, 5)}, "dtype torch.bool"),
        (model, one, {"positions": torch.ones(5).bool()}, r"a mask \[batch, seq\]"),
        (net, own, {"positions": "last"}, "only of a Hugging Face model"),
    ]
    for where, steers, how, says in told:
        with (
            pytest.raises(ArgumentError, match=says),
            equiv.steer(where, steers, **how),
        ):
            pass


@torch.no_grad()
def test_wrong_batches_say_what_to_do() -> None:
    model, net = llama(), nn.Sequential(nn.Linear(4, 4))
    one = {(0, "mlp_out"): Vector(random(16))}
    own = {(0, "0"): Vector(random(4))}
    square = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    last = {"positions": "last"}

    def ask(**call: Any) -> Any:
        return lambda: model.generate(IDS, pad_token_id=0, max_new_tokens=2, **call)

    told: list[tuple[Any, Any, dict[str, Any], Any, str]] = [
        (model, [one], {"index": [0]}, lambda: run(model), "for the 2 rows of the bat"),
        (model, [one], {"index": [0]}, ask(num_beams=2), "for the 2 rows of the batch"),
        (model, one, {"positions": square[:, 0, 0, :4]}, lambda: run(model), "5 col"),
        (model, one, {"positions": square[:, 0, 0, :4]}, ask(), "for the 5 columns"),
        (model, one, last, lambda: model(IDS, attention_mask=square), "tells padding"),
        (model, one, last, ask(cache_implementation="static"), "`attention_mask`"),
        (
            model,
            one,
            last,
            lambda: model.model.layers[0].mlp(random(1, 2, 16)),
            "alone",
        ),
        (net, [own], {"index": [0]}, lambda: net(torch.ones(2, 4)), r"\(1,\) × feat"),
    ]
    for where, steers, how, call, says in told:
        with (
            equiv.steer(where, steers, **how),
            pytest.raises(ArgumentError, match=says),
        ):
            call()


@torch.no_grad()
def test_modules_are_steered_by_mask_and_row() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), random(2, 3, 4)
    bank = [{(0, "0"): Vector(random(4, seed=n))} for n in range(2)]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    plain = net(x)
    with equiv.steer(net, bank, index=[1, 0], positions=mask):
        found = net(x)
    for row, number in enumerate((1, 0)):
        for token in range(3):
            v = random(4, seed=number) if mask[row, token] else torch.zeros(4)
            assert torch.equal(found[row, token], plain[row, token] + v)
