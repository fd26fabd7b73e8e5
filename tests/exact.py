"""What the tests of exact weight forms share: logits in float64, drawn steers, a table.

The table of what is exact is written down once more here, family by family, and not
from the library's rules.
"""

from collections.abc import Mapping
from typing import Any

import torch
import witness
from torch import Tensor, nn

import equiv

IDS = torch.tensor([[3, 9, 4, 11, 5], [7, 7, 2, 8, 1]])
NORMED = ("gemma2", "olmo2")  # a norm after each projection
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
LINEAR = ("affine", "linear", "loreft", "heads", "identity")
F64 = torch.float64

# (read, write) where anything affine is a weight edit, and where vectors are beside.
INSIDE = {(site, site) for site in ("attn_heads", "mlp_in", "mlp_hidden")}
WRITTEN = {
    ("attn_out", "attn_out"),
    ("attn_heads", "attn_out"),
    ("mlp_out", "mlp_out"),
    ("mlp_hidden", "mlp_out"),
}
SUMMED = {
    ("attn_out", "resid_mid"),
    ("attn_heads", "resid_mid"),
    ("mlp_out", "block_out"),
    ("mlp_hidden", "block_out"),
}


def is_exact(family: str, form: str, read: str, write: str) -> bool:
    """Whether a steer that is not zero is a weight edit."""
    if form in ("vector", "constant"):
        inside = ("attn_heads", "mlp_in", "mlp_hidden")
        return write in inside if family in NORMED else True
    if form not in LINEAR:
        return False
    if (read, write) in INSIDE:
        return True
    if (read, write) == ("resid_mid", "mlp_in"):  # one and the same there
        return family in ("bert", "olmo2")
    if family in NORMED:
        return False
    if (read, write) in WRITTEN:
        return True
    if family == "bert":
        # The LayerNorm behind them scales entry by entry.
        return form == "heads" and read == write and write in ("resid_mid", "block_out")
    return (read, write) in SUMMED


def draw(form: str, d: int, e: int, rank: int, seed: int) -> equiv.Steering:
    """A steer of a form that reads width d and writes width e; float64."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=g, dtype=F64)

    if form == "vector":
        return equiv.Vector(r(e))
    if form in ("affine", "linear"):
        return equiv.Affine(r(rank, d), r(e, rank), r(e) if form == "affine" else None)
    if form == "loreft":
        rotation = torch.linalg.qr(r(d, rank))[0].T
        return equiv.LoReFT(rotation, r(rank, d), r(rank))
    if form == "heads":
        parts = {"offset": r(2, d // 2), "scale": r(2, d // 2)}
        if seed % 3 == 1:  # one head alone
            parts = {"scale": parts["scale"] * torch.tensor([[0.0], [1.0]])}
        if seed % 3 == 2:
            parts |= {"gate_offset": r(2), "gate_scale": r(2)}
        return equiv.Heads(**parts)
    down, up = r(rank, d), r(e, rank)
    if form == "constant":  # its shift does not depend on h
        down = torch.zeros_like(down)
    activation = "identity" if form == "identity" else "silu"
    return equiv.LowRankMLP(down, up, r(rank), r(e), activation)


def width(model: Any, site: str) -> int:
    return {"mlp_hidden": 24}.get(site, 16)


def logits(model: nn.Module) -> Tensor:
    """In the arithmetic of float64, which transformers' norms and softmax leave."""
    with torch.no_grad(), witness.own_arithmetic():
        return model(input_ids=IDS).logits


def steered(model: nn.Module, steering: Mapping[Any, Any]) -> Tensor:
    with equiv.steer(model, steering):
        return logits(model)


def close(actual: Tensor, expected: Tensor) -> None:
    # Each way is one forward: some 40 products of length up to 24 and as many sums on
    # the way to a logit, in two layers whose gains are up to 10³ under such steers.
    # 2·40·24·10³ roundings of 2⁻⁵³ in the worst case: 2·10⁻¹⁰ of the largest logit.
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-10 * scale)


def block(model: Any, layer: int) -> Any:
    path, _ = witness.PLACES[model.config.model_type]
    return model.get_submodule(path)[layer]


def changed(base: nn.Module, edited: nn.Module) -> set[str]:
    before = dict(base.named_parameters())
    return {
        name
        for name, after in edited.named_parameters()
        if (bool(after.any()) if name not in before else not after.equal(before[name]))
    }
