"""What the modules of one block are given and give, in one run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.model.batches import Batch
from equiv.model.blocks import Blocks
from equiv.model.precision import arithmetic
from equiv.model.sites import first_tensor

_CLOSE = 1e-4  # of float32 sums; two things that are not the same differ by about 1


@dataclass
class Recording:
    """One run of a block.

    Attributes:
        x: What the block is given, [batch, seq, d].
        y: What it gives.
        returns: Entries of the tuple that it returns; 0 for a tensor.
        inputs: What its modules are given, in the order in which they are called.
        outputs: What they give, of the shape of x, in the order in which they end.
        numbers: Numbers that the block keeps.
        linear: Which of its modules are linear layers.
        flat: Inputs (by "name<") and outputs that are kept as [batch · seq, d].
    """

    x: Tensor
    y: Tensor
    returns: int
    numbers: Mapping[str, float]
    linear: frozenset[str]
    flat: frozenset[str]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def given(self, tensor: Tensor) -> str:
        """The first module that is given a tensor; empty if none is."""
        return next((n for n, u in self.inputs.items() if same(u, tensor)), "")

    def giving(self, tensor: Tensor) -> list[str]:
        """The modules that give a tensor, the outermost first."""
        found = [n for n, out in self.outputs.items() if same(out, tensor)]
        return sorted(found, key=lambda name: name.count("."))

    def last_linear(self, tensor: Tensor) -> str:
        """The linear layer that makes a tensor, by itself or in front of a norm."""
        for name in self.giving(tensor):
            if name in self.linear:
                return name
        for name in self.giving(tensor):
            for path in self.giving(self.inputs[name]):
                if path in self.linear:
                    return path
        return ""

    def reader(self, tensor: Tensor, stream: Tensor) -> str:
        """The MLP: makes a tensor of what a norm gives, or reads the stream itself."""
        for name in self._with_norms(tensor):
            given = self.inputs[name]
            if same(given, stream):
                return name
            if any(same(self.outputs[norm], given) for norm in self._norms()):
                return name
        first = self.given(stream)
        if first not in self._norms():
            return first
        return self.given(self.outputs[first])

    def _with_norms(self, tensor: Tensor) -> list[str]:
        made = self.giving(tensor)
        before = [
            path
            for name in made
            if name in self._norms()
            for path in self.giving(self.inputs[name])
        ]
        return [name for name in (*made, *before) if name not in self._norms()]

    def _norms(self) -> list[str]:
        """What may be a norm: has no parts, is not linear, changes what it is given."""
        names = set(self.inputs)
        return [
            name
            for name, out in self.outputs.items()
            if name not in self.linear
            and not any(other.startswith(f"{name}.") for other in names)
            and not same(out, self.inputs[name])
        ]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, up to rounding."""
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= _CLOSE * other.norm())


def recorded(
    model: nn.Module, blocks: Blocks, batch: Batch, dtype: torch.dtype
) -> Recording:
    """Run the first block as the model runs it, in a dtype of choice.

    Raises:
        TypeError: If the block is not given or does not give a hidden state first.
    """
    block = blocks.modules[0]
    args, kwargs = _called(model, block, batch)
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    own = {name: _cast(value, dtype) for name, value in tensors.items()}
    args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with arithmetic(dtype), _noting(block, inputs, outputs):
        out = functional_call(block, own, args, kwargs)
    x = first_tensor(args[0] if args else kwargs["hidden_states"])
    flat = {f"{name}<" for name, t in inputs.items() if t.ndim == 2}
    flat |= {name for name, t in outputs.items() if t.ndim == 2}
    inputs, outputs = _unflattened(inputs, x), _unflattened(outputs, x)
    made = Recording(
        x,
        first_tensor(out),
        0 if isinstance(out, Tensor) else len(out),
        {n: v for n, v in vars(block).items() if isinstance(v, float)},
        frozenset(n for n, m in block.named_modules() if _is_linear(m)),
        frozenset(flat),
        inputs,
        {n: t for n, t in outputs.items() if t.shape == x.shape and n in inputs},
    )
    rows, tokens = batch.mask.shape
    if made.y.shape != x.shape or x.ndim != 3 or len(x) != rows:
        raise TypeError(f"its blocks turn {tuple(x.shape)} into {tuple(made.y.shape)}")
    if "input_ids" in batch.arguments and x.shape[1] != tokens:
        raise TypeError(f"its blocks are given {x.shape[1]} tokens for {tokens}")
    return made


def _unflattened(tensors: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The tensors as [batch, seq, d], also those that are [batch · seq, d]."""
    batch, seq = x.shape[:2]
    return {
        name: t.view(batch, seq, -1) if t.ndim == 2 and len(t) == batch * seq else t
        for name, t in tensors.items()
    }


def _called(
    model: nn.Module, block: nn.Module, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How the model calls a block."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        model(**batch.arguments)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise TypeError(f"its first block is run {len(seen)} times")
    return seen[0]


@contextmanager
def _noting(
    block: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[None]:
    """Hooks that keep copies of what modules that run once are given and give."""
    runs: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def note(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runs[name] = runs.get(name, 0) + 1
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, Tensor):
                inputs[name] = given.clone()

        return note

    def after(name: str) -> Callable[..., None]:
        def note(_m: nn.Module, _a: object, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, Tensor):
                outputs[name] = first.clone()

        return note

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name:
                own = before(name)
                pre = module.register_forward_pre_hook(own, with_kwargs=True)
                stack.callback(pre.remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        yield
    for name, count in runs.items():
        if count > 1:
            inputs.pop(name, None)
            outputs.pop(name, None)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in a value in another dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return {name: _cast(entry, dtype) for name, entry in value.items()}
    return value
