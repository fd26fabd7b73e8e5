"""Training of methods that are compared: what is trained, where, and how it is kept."""

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from equiv.demo.train import IDS, VOCABULARY
from equiv.steering.forms.mlp import LowRankMLP
from equiv.tasks.listops import evaluate, generate
from equiv.theory.trained.adapting import (
    Adapted,
    Asked,
    Method,
    adapt,
    asked,
    by_rate,
    loss,
    overlaps,
    scores,
    written,
)

WIDTH, LAYERS, RANK = 16, 2, 2
OPERATORS = ("MAX", "LAST")
EVERY = [
    Method("linear", rank=RANK),
    Method("silu", rank=RANK),
    Method("loreft", "mlp_in", RANK, "last"),
    Method("loreft", rank=RANK),
    Method("vector"),
    Method("vector", positions="last"),
    Method("heads", "attn_heads"),
    Method(lora=RANK),
    Method(full=True),
    *(
        Method("linear", rank=RANK, lora=RANK, constraint=constraint)
        for constraint in ("none", "output", "input", "both")
    ),
]


def small_base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=IDS["<pad>"],
        bos_token_id=None,
        eos_token_id=IDS["<eos>"],
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> Any:
    return small_base()


@pytest.fixture(scope="module")
def data() -> list[Asked]:
    source = generate(OPERATORS, 1)
    return [asked(islice(source, 8)) for _ in range(6)]


def test_answers_are_asked_at_brackets_and_never_shown(data: list[Asked]) -> None:
    for row, example in enumerate(islice(generate(OPERATORS, 1), 8)):
        batch = data[0]
        n = len(example.tokens)
        shown = [VOCABULARY[i] for i in batch.ids[row, :n]]
        assert shown == list(example.tokens)
        assert not batch.ids[row, n:].any() and int(batch.mask[row].sum()) == n
        for place, value in enumerate(example.values):
            assert bool(batch.weights[row, place]) == (value is not None)
            if value is not None:
                assert VOCABULARY[batch.targets[row, place]] == str(value)
        assert batch.answers(batch.targets)[row] == IDS[str(example.answer)]


def test_the_loss_is_the_mean_over_brackets(base: Any) -> None:
    batch = asked([evaluate("[MAX 3 5 ]"), evaluate("[LAST 4 [MAX 1 2 ] ]")])
    logits = base(**batch.inputs).logits
    places = [(0, 3, "5"), (1, 5, "2"), (1, 6, "2")]
    own = [-logits[r, p].log_softmax(-1)[IDS[v]] for r, p, v in places]
    assert float(loss(logits, batch)) == pytest.approx(float(sum(own)) / 3, rel=1e-6)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_only_what_the_method_says_is_trained(
    base: Any, data: list[Asked], method: Method
) -> None:
    before = copy.deepcopy(base.state_dict())
    found = adapt(base, method, data, rate=1e-2, seed=3)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    own = {k.replace(".base_layer", ""): v for k, v in found.model.state_dict().items()}
    frozen = {k: own.get(k, own.get(f"base_model.model.{k}")) for k in before}
    assert None not in frozen.values()
    same = [torch.equal(before[k], v) for k, v in frozen.items() if v is not None]
    assert not any(same) if method.full else all(same)
    expected = {
        "": 0,
        "linear": 2 * RANK * WIDTH,
        "silu": 2 * RANK * WIDTH,
        "loreft": 2 * RANK * WIDTH + RANK,
        "vector": WIDTH,
        "heads": WIDTH,
    }[method.form] * LAYERS
    assert found.steering.num_parameters == expected
    # Four square matrices and three between d and 2 d.
    expected += LAYERS * method.lora * (4 * 2 * WIDTH + 3 * 3 * WIDTH)
    expected += method.full * sum(p.numel() for p in base.parameters())
    assert found.parameters == expected
    assert {site for _, site in found.steering} <= {method.site}


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_training_starts_where_the_base_is_and_lowers_the_loss(
    base: Any, data: list[Asked], method: Method
) -> None:
    batch = data[0]
    plain = base(**batch.inputs).logits
    still = adapt(base, method, [batch] * 2, rate=0.0, seed=3).logits(batch)
    torch.testing.assert_close(still, plain)
    moved = adapt(base, method, [batch] * 30, rate=3e-2, seed=3).logits(batch)
    assert loss(moved, batch) < loss(plain, batch) - 0.01


def by_hand(base: Any, found: Adapted, batch: Asked, last: bool) -> Tensor:
    """Plain hooks that add up · down · h at chosen tokens of the blocks' outputs."""
    handles = []
    rows = torch.arange(len(batch.ids))
    chosen = torch.zeros(batch.ids.shape)
    chosen[rows, batch.last] = 1.0
    chosen = chosen[..., None] if last else torch.ones(*batch.ids.shape, 1)
    for (layer, _), form in found.steering.items():
        assert isinstance(form, LowRankMLP) and form.activation == "identity"

        def hook(module: Any, inputs: Any, h: Tensor, form: Any = form) -> Tensor:
            return h + chosen * torch.einsum("bsd,rd,er->bse", h, form.down, form.up)

        block = base.get_submodule(f"model.layers.{layer}")
        handles.append(block.register_forward_hook(hook))
    logits = base(**batch.inputs).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("positions", ["all", "last"])
def test_scores_are_those_of_plain_hooks(
    base: Any, data: list[Asked], positions: str
) -> None:
    method = Method("linear", rank=RANK, positions=positions)
    found = adapt(base, method, data * 5, rate=1e-2, seed=3)
    batch = data[2]
    logits = by_hand(base, found, batch, positions == "last")
    plain = base(**batch.inputs).logits
    answers, wrong = [], 0
    for row in range(len(batch.ids)):
        n = int(batch.mask[row].sum())
        own = logits[row, n - 1].double().log_softmax(-1)
        target = int(batch.targets[row, n - 1])
        answers.append(-float(own[target]))
        wrong += int(own.argmax()) != target
    got = scores(found, batch)
    assert got["loss"] == pytest.approx(sum(answers) / len(answers), rel=1e-4)
    assert got["accuracy"] == pytest.approx(1 - wrong / len(answers))
    inner = batch.mask.bool().clone()
    inner[torch.arange(len(inner)), batch.last] = False
    moved = (found.logits(batch) - plain)[inner].abs().max()
    assert bool(moved == 0) == (positions == "last")


def test_training_is_at_the_positions_that_are_steered_later(base: Any) -> None:
    """Inner brackets cannot be learned by steering the last token alone."""
    batch = asked([evaluate("[MAX 3 [MAX 1 2 ] ]")] * 4)
    steered = {
        positions: adapt(
            base,
            Method("vector", positions=positions),
            [batch] * 40,
            rate=3e-2,
            seed=0,
        )
        for positions in ("all", "last")
    }
    inner = {name: found.logits(batch)[:, 5] for name, found in steered.items()}
    plain = base(**batch.inputs).logits[:, 5]
    assert torch.equal(inner["last"], plain) and not torch.equal(inner["all"], plain)
    assert steered["last"].steering.positions == "last"


@pytest.mark.parametrize("constraint", ["none", "output", "input", "both"])
def test_the_final_model_obeys_its_constraint(
    base: Any, data: list[Asked], constraint: str
) -> None:
    method = Method("linear", rank=RANK, lora=RANK, constraint=constraint)
    found = adapt(base, method, data, rate=1e-2, seed=3)
    apart = {"output": [], "input": []}
    for (layer, _), form in found.steering.items():
        assert isinstance(form, LowRankMLP)
        by_lora = written(found.model, layer)
        assert by_lora.abs().max() > 0
        for name, columns in (("output", form.up), ("input", form.down.T)):
            a, b = (torch.linalg.qr(m.double()).Q for m in (by_lora, columns))
            cosines = torch.linalg.svdvals(a.T @ b)
            apart[name].append(float(cosines.square().mean()))
    assert overlaps(found) == {k: pytest.approx(v, abs=1e-12) for k, v in apart.items()}
    for name, values in apart.items():
        kept = constraint in (name, "both")
        assert all((value < 1e-10) == kept for value in values)


def test_rates_are_compared_by_what_they_lead_to(base: Any, data: list[Asked]) -> None:
    method, rates = Method("vector"), (1e-6, 1e-2)
    losses = by_rate(base, method, data, data[-1], rates, 0)
    for rate in rates:
        found = adapt(base, method, data, rate=rate, seed=0)
        assert losses[rate] == scores(found, data[-1])["loss"]
    assert losses[1e-2] < losses[1e-6]


def test_trainings_are_the_same_from_the_same_seed(
    base: Any, data: list[Asked]
) -> None:
    method = Method("loreft", rank=RANK, lora=RANK)
    one, two, other = (
        adapt(base, method, data, rate=1e-2, seed=s).logits(data[0]) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
