"""One report of each kind, for the tests of its renderings."""

from functools import cache

import torch

import equiv
from equiv.report.report import Report
from equiv.testing.models import mlp, transformer

NAMES = (
    "llama",
    "part",
    "random",
    "bert",
    "encoder",
    "head",
    "few",
    "vector",
    "module",
    "long",
    "single",
    "fails",
    "pairs",
    "further",
    "reader",
)
PLAIN = ("module", "long", "fails", "reader")
# What these steers read is not where they write.
PAIRS = ("pairs", "further", "reader")


@cache
def reports() -> dict[str, Report]:
    ids = torch.randint(3, 32, (12, 9), generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    llama = transformer("llama", seed=1, dtype=torch.float32)
    bert = transformer("bert", seed=1, dtype=torch.float32)
    net = mlp((4, 8, 8, 3), dtype=torch.float32)
    long = torch.nn.Sequential()
    for i, layer in enumerate(mlp([4] * 14, dtype=torch.float32)):
        long.add_module(f"a_rather_long_name_{i}", layer)

    def update(model: torch.nn.Module) -> equiv.Update:
        return equiv.Update.random(model, 0.05, seed=2)

    return {
        "llama": equiv.check(llama, update(llama), ids),
        "part": equiv.check(
            llama, update(llama).restricted(layers=[1]), ids, at="base"
        ),
        "random": equiv.check(llama, update(llama)),
        "bert": equiv.check(bert, update(bert), ids),
        "encoder": equiv.check(bert.bert, update(bert.bert), ids),
        "head": equiv.check(llama, update(llama).restricted(names="lm_head.*"), ids),
        "few": equiv.check(llama, update(llama), ids[:4]),
        "vector": equiv.check(llama, update(llama), ids, forms=("vector",)),
        "module": equiv.check(net, update(net), x),
        "long": equiv.check(long, update(long), x),
        "single": equiv.check(llama, update(llama), ids[:1]),
        "fails": equiv.check(
            mlp((4, 8, 3), "relu"), update(mlp((4, 8, 3))).scaled(30), x.double()
        ),
        "pairs": equiv.check(
            llama, update(llama), ids, sites=("resid_mid->block_out", "block_out")
        ),
        "further": equiv.check(
            bert,
            update(bert),
            ids,
            sites=("mlp_in->block_out", "attn_heads", "resid_mid", "mlp_hidden"),
        ),
        "reader": equiv.check(net, update(net), x, sites=("0->2", "3")),
    }
