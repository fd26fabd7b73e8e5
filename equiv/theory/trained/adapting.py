"""Ways to adapt a small Llama to a task, trained alike so that they can be compared.

Steering at a site of every block, LoRA, both at once, or all weights. Every method gets
the same expressions in the same order, the same loss (the value of each bracket, at the
bracket), the same steps of AdamW with one cycle of the learning rate; only what is
trained differs, and the rate, which is chosen among the same few for each on a base of
its own (`by_rate`).

Steering starts as an exact no-op: up = 0 in linear and SiLU adapters, W = R and b = 0
in LoReFT, zero vectors. Trained jointly with LoRA, the adapter can be kept off what
LoRA's `down_proj` of its block writes, as in claim 30: what it writes ("output"), what
it reads ("input"), or both, projected after every step, so that the final model obeys.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from equiv.behaviour.trainable import Trainable, as_trainable, orthonormal
from equiv.demo.train import encode
from equiv.steering.applying.apply import steer
from equiv.steering.forms.form import Steering
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.mlp import LowRankMLP
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.forms.vector import Vector
from equiv.tasks.listops import MAX_TOKENS, Example
from equiv.theory.subspaces import overlap, projector

FORMS = ("linear", "silu", "loreft", "vector", "heads")
CONSTRAINTS = ("none", "output", "input", "both")
Key = tuple[int, str]


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        form: Of the steering, one of `FORMS`; "" for none.
        site: Where every block is steered.
        rank: Of linear, SiLU and LoReFT steering.
        positions: Which tokens are steered: "all", or "last", the prompt's last.
        lora: Rank of LoRA on every linear layer of the blocks; 0 for none.
        constraint: What of the steering is kept off LoRA, one of `CONSTRAINTS`.
        full: Whether all weights are trained.
    """

    form: str = ""
    site: str = "block_out"
    rank: int = 4
    positions: str = "all"
    lora: int = 0
    constraint: str = "none"
    full: bool = False


@dataclass(frozen=True)
class Asked:
    """A batch of expressions, without their answers.

    Attributes:
        ids: [batch, seq], padded on the right.
        mask: What is no padding, [batch, seq], 0 or 1.
        targets: At closing brackets their value, as a token, [batch, seq].
        weights: 1 at closing brackets, 0 elsewhere, [batch, seq].
        last: Column of each expression's last token, its root's bracket, [batch].
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor
    last: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """As a model takes them."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def answers(self, values: Tensor) -> Tensor:
        """What stands at the last tokens, [batch, …]."""
        return values[torch.arange(len(self.ids)), self.last]


@dataclass(frozen=True)
class Adapted:
    """What came of a training.

    Attributes:
        model: The base with whatever weights were trained, in eval mode.
        steering: What is to be added to it.
        parameters: How many numbers were trained.
    """

    model: nn.Module
    steering: SteeringSet
    parameters: int

    @torch.no_grad()
    def logits(self, asked: Asked) -> Tensor:
        """[batch, seq, vocabulary]."""
        with steer(self.model, self.steering):
            return self.model(**asked.inputs).logits


def asked(examples: Iterable[Example]) -> Asked:
    """Expressions as one batch.

    Example:
        >>> from equiv.tasks.listops import evaluate
        >>> batch = asked([evaluate("[MAX 3 5 ]"), evaluate("[MIN 4 [MAX 1 2 ] ]")])
        >>> batch.mask.sum(1), batch.weights.sum(1), batch.last
        (tensor([4, 7]), tensor([1., 2.]), tensor([3, 6]))
    """
    examples = list(examples)
    ids, targets, weights = (t[:, :MAX_TOKENS] for t in encode(examples))
    last = torch.tensor([len(example.tokens) for example in examples]) - 1
    mask = (torch.arange(ids.shape[1]) <= last[:, None]).long()
    return Asked(ids * mask, mask, targets, weights, last)


def unsteered(model: nn.Module) -> Adapted:
    """A model as it is."""
    return Adapted(model, SteeringSet({}), 0)


def adapt(
    base: Any, method: Method, data: Sequence[Asked], *, rate: float, seed: int
) -> Adapted:
    """Train one method on a copy of the base, one step per batch.

    Args:
        base: A Llama; it is left as it is.
        method: What is trained.
        data: The batches.
        rate: The largest learning rate of the cycle.
        seed: Draws what does not start at zero.
    """
    model = copy.deepcopy(base).requires_grad_(method.full)
    if method.lora:
        model = _with_lora(model, method.lora, seed)
    parts = start(base, method, seed)
    keep_apart(model, parts, method.constraint)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained += [t for part in parts.values() for t in part.parameters.values()]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=len(data), pct_start=0.1
    )
    model.train()
    with _training(model, parts, method.positions):
        for batch in data:
            optimizer.zero_grad()
            loss(model(**batch.inputs).logits, batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            keep_apart(model, parts, method.constraint)
    steering = {key: part.frozen() for key, part in parts.items()}
    count = sum(p.numel() for p in trained)
    model.eval().requires_grad_(False)
    return Adapted(model, SteeringSet(steering, method.positions), count)


def start(base: Any, method: Method, seed: int) -> dict[Key, Trainable]:
    """Steering of every block, ready to be trained; it adds nothing yet."""
    if not method.form:
        return {}
    keys = [(n, method.site) for n in range(base.config.num_hidden_layers)]
    return {
        key: as_trainable(key, _start(base.config, method, 100 * seed + n), base.dtype)
        for n, key in enumerate(keys)
    }


def _start(config: Any, method: Method, seed: int) -> Steering:
    d, r, heads = config.hidden_size, method.rank, config.num_attention_heads
    if method.form == "vector":
        return Vector(torch.zeros(d))
    if method.form == "heads":
        return Heads(offset=torch.zeros(heads, d // heads))
    if method.form == "loreft":
        drawn = torch.randn(r, d, generator=torch.Generator().manual_seed(seed))
        rotation = orthonormal(drawn)
        return LoReFT(rotation, rotation.clone(), torch.zeros(r))
    activation = {"linear": "identity", "silu": "silu"}[method.form]
    return LowRankMLP.zero(d, rank=r, activation=activation, seed=seed)


def loss(logits: Tensor, batch: Asked) -> Tensor:
    """Mean cross-entropy of the brackets' values."""
    losses = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


@torch.no_grad()
def scores(adapted: Adapted, held_out: Asked) -> dict[str, float]:
    """Cross-entropy of the answers, in nats, and the share of them that is right."""
    answers = held_out.answers(adapted.logits(held_out))
    targets = held_out.answers(held_out.targets)
    return {
        "loss": float(cross_entropy(answers.double(), targets)),
        "accuracy": float((answers.argmax(-1) == targets).double().mean()),
    }


def by_rate(
    base: Any,
    method: Method,
    data: Sequence[Asked],
    validation: Asked,
    rates: Sequence[float],
    seed: int,
) -> dict[float, float]:
    """The validation loss after training at each rate."""
    tried = {rate: adapt(base, method, data, rate=rate, seed=seed) for rate in rates}
    return {rate: scores(found, validation)["loss"] for rate, found in tried.items()}


@torch.no_grad()
def keep_apart(
    model: nn.Module, parts: Mapping[Key, Trainable], constraint: str
) -> None:
    """Project the steering off the columns of B of each block's `down_proj`."""
    if constraint == "none":
        return
    for (layer, _), part in parts.items():
        kept = projector(written(model, layer))
        up, down = part.parameters["up"], part.parameters["down"]
        if constraint in ("output", "both"):
            up.copy_(kept @ up.double())
        if constraint in ("input", "both"):
            down.copy_(down.double() @ kept)


def written(model: Any, layer: int) -> Tensor:
    """B of LoRA on `down_proj`, whose columns it writes into, [d, rank], float64."""
    down = model.base_model.model.model.layers[layer].mlp.down_proj
    return down.lora_B["default"].weight.detach().double()


def overlaps(adapted: Adapted) -> dict[str, list[float]]:
    """Layer by layer, how far steering and `down_proj`'s LoRA share directions.

    Returns:
        "output": col U against col B, what both write; "input": row D against col B,
        what the steering reads of what LoRA writes. 1 for the same spaces, k/d by
        chance, k the larger of their dimensions.
    """
    found: dict[str, list[float]] = {"output": [], "input": []}
    for (layer, _), form in adapted.steering.items():
        assert isinstance(form, LowRankMLP)
        by_lora = written(adapted.model, layer)
        found["output"].append(overlap(by_lora, form.up.double()))
        found["input"].append(overlap(by_lora, form.down.double().T))
    return found


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    """LoRA of scale 1 on every linear layer of the blocks, as the published code's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(model, config)


@contextmanager
def _training(
    model: nn.Module, parts: Mapping[Key, Trainable], positions: str
) -> Iterator[None]:
    """The model with steering that follows its parameters."""

    def now(part: Trainable) -> Callable[[Tensor], Tensor]:
        return lambda h: part.current()(h)

    live: Any = {key: now(part) for key, part in parts.items()}
    with steer(model, live, positions=positions):
        yield
