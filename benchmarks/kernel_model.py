"""A whole model steered by row: what generation costs, against plain hooks.

A Llama of the shape of the 8B one, with random weights, every block's output steered:
not at all, by one low-rank steer, by 64 different ones in one batch (`equiv.steer` with
`index`), and by plain hooks that gather each sequence's weights and use `bmm`. Figures
are throughputs over the unsteered one's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import equiv

TARGETS = {"prefill": 0.95, "decode": 0.90}  # of 64 steers, over unsteered


@dataclass(frozen=True)
class Size:
    """Of the model, the batch, and the steers."""

    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    batch: int
    prompt: int
    new: int
    rank: int
    rounds: int


LARGE = Size(4096, 32, 32, 14336, 128256, 64, 256, 32, 16, 3)
TINY = Size(64, 2, 4, 96, 64, 4, 6, 3, 4, 1)


def measured(device: str, *, timed: bool) -> dict[str, Any]:
    """Throughputs; nothing but whether it runs and is right, if not timed."""
    size = LARGE if timed else TINY
    model, bank = new_model(size, device), new_bank(size, device)
    ids = torch.randint(size.vocabulary, (size.batch, size.prompt), device=device)
    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "unsteered": nullcontext,
        "one steer": lambda: equiv.steer(model, bank[0]),
        f"{size.batch} steers": lambda: equiv.steer(
            model, bank, index=range(size.batch)
        ),
        "plain hooks": lambda: plain_hooks(model, bank),
    }
    off = compare(model, ids, ways[f"{size.batch} steers"], ways["plain hooks"])
    found: dict[str, Any] = {"size": vars(size), "off_plain_hooks": off}
    if not timed:
        for way in ways.values():
            with way():
                decode(model, ids, size)
        return found
    seconds: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        with way():
            seconds[name] = {
                "prefill": fastest(lambda: prefill(model, ids), size.rounds),
                "decode": fastest(lambda: decode(model, ids, size), size.rounds),
            }
            seconds[name]["decode"] -= seconds[name]["prefill"]
    unit = seconds["unsteered"]
    found["seconds"] = seconds
    found["over_unsteered"] = {
        name: {kind: round(unit[kind] / own[kind], 3) for kind in own}
        for name, own in seconds.items()
    }
    found["targets"] = TARGETS
    return found


def new_model(size: Size, device: str) -> Any:
    """A Llama with random weights, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 4),
        intermediate_size=size.inner,
        vocab_size=size.vocabulary,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def new_bank(size: Size, device: str) -> list[dict[Any, equiv.Steering]]:
    """A low-rank MLP per sequence and block, in bfloat16."""
    source = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=source, device=device)
        return (drawn / shape[-1] ** 0.5).bfloat16()

    return [
        {
            (layer, "block_out"): equiv.LowRankMLP(
                random(size.rank, size.hidden), 0.1 * random(size.hidden, size.rank)
            )
            for layer in range(size.layers)
        }
        for _ in range(size.batch)
    ]


@contextmanager
def plain_hooks(model: Any, bank: list[dict[Any, Any]]) -> Iterator[None]:
    """Each sequence's weights in one tensor, used by `bmm`; one hook per block."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            own = [member[layer, "block_out"] for member in bank]
            down = torch.stack([form.down for form in own])
            up = torch.stack([form.up for form in own])

            def hook(
                _module: object,
                _args: object,
                out: Tensor,
                down: Tensor = down,
                up: Tensor = up,
            ) -> Tensor:
                a = functional.silu(torch.bmm(out, down.mT))
                return torch.baddbmm(out, a, up.mT)

            stack.callback(block.register_forward_hook(hook).remove)
        yield


def compare(
    model: Any,
    ids: Tensor,
    ours: Callable[[], AbstractContextManager[object]],
    plain: Callable[[], AbstractContextManager[object]],
) -> float:
    """Difference of the logits to plain hooks', over how far those moved them.

    Raises:
        SystemExit: If it is more than bfloat16 in every block explains.
    """
    logits = []
    for way in (nullcontext, ours, plain):
        with way():
            logits.append(model(input_ids=ids, use_cache=False).logits[:, -1].float())
    off = float((logits[1] - logits[2]).norm() / (logits[2] - logits[0]).norm())
    if not off < 0.2:
        raise SystemExit(f"Steering by row is wrong, so nothing is timed: {off:.3g}.")
    return off


def prefill(model: Any, ids: Tensor) -> None:
    """One forward over the prompts, logits of the last token only."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: Tensor, size: Size) -> None:
    """Prefill and as many new tokens for every prompt."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=size.new,
        min_new_tokens=size.new,
        do_sample=False,
        pad_token_id=0,
    )


def fastest(call: Callable[[], None], rounds: int) -> float:
    """Seconds of the fastest of some calls."""
    call()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
