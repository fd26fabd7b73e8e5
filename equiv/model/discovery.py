"""Blocks of a family that is in no table: found by their looks, believed when proven.

The blocks are the largest list of equal modules. What attention and the MLP add is read
off one run of one block, by numbers and not by names: with x what the block is given, y
what it gives and a, m what modules of it give,

    plain       y = x + s a + s m,    s = 1 or a number that the block keeps
    post-norm   y = N(r + m)  with  r = N'(x + a),  N and N' modules of it

and between the two lies the stream r = x + s a, if some module is given that. A guess
is proven as the lines of the table are (`probe.py`), and, since nobody has read the
model's code, by running it block by block: its output has to be the model's own. Where
the guess is not proven, what is left are the blocks' outputs.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from equiv.errors import EquivError, UnsupportedModelError
from equiv.model.architecture import Architecture
from equiv.model.batches import Batch
from equiv.model.blocks import Blocks, model_type
from equiv.model.drawn_call import drawn_call
from equiv.model.guard import measured
from equiv.model.known_families import TABLE
from equiv.model.precision import arithmetic
from equiv.model.probe import landings
from equiv.model.recording import Recording, recorded, same
from equiv.model.staged_model import StagedModel

_FOUND: WeakKeyDictionary[nn.Module, Blocks] = WeakKeyDictionary()


def discover(model: nn.Module) -> Blocks:
    """The blocks of a model of an unknown family, proven.

    Raises:
        UnsupportedModelError: If it has none, or cannot be run block by block.
    """
    path, modules = _largest_list(model)
    found = _FOUND.get(model)
    if found is None or found.modules != tuple(modules):  # blocks may be replaced
        with measured(model), torch.no_grad():
            found = _FOUND[model] = _proven(model, path, modules)
    return found


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(entry) for entry in module}) == 1
    ]
    if not lists:
        raise _unknown(model, "no list of equal blocks was found in it")
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def _proven(model: nn.Module, path: str, modules: nn.ModuleList) -> Blocks:
    batch = drawn_call(model)
    if batch is None:
        raise _unknown(model, "what it reads is not known, so it cannot be tried")
    double = any(p.dtype == torch.float64 for p in model.parameters())
    dtype = torch.float64 if double else torch.float32
    bare = Blocks(path, tuple(modules), Architecture(path))
    try:
        seen = recorded(model, bare, batch, dtype)
        bare = replace(bare, architecture=Architecture(path, returns=seen.returns))
        _check_whole(model, bare, batch, dtype)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        why = f"run block by block, it fails: {str(error).rstrip('.')}"
        raise _unknown(model, why) from error
    for guess in _guesses(bare.architecture, seen):
        blocks = replace(bare, architecture=guess)
        cut = StagedModel(model, blocks, [batch], dtype)
        if all(landing.holds for landing in landings(cut)):
            return blocks
    return bare


def _check_whole(
    model: nn.Module, blocks: Blocks, batch: Batch, dtype: torch.dtype
) -> None:
    """Refuse a model that is not its blocks, one after the other."""
    cut = StagedModel(model, blocks, [batch], dtype)
    with arithmetic(dtype):
        cut.cut(())
        hidden: Tensor | None = None
        for stage in cut.stages:
            tensors = cut.tensors(stage)
            with cut.hooked([stage]):
                hidden = cut.run(stage, tensors, hidden, 0)[0]
        whole = cut.whole(0)
    assert hidden is not None
    if not same(hidden, whole):
        raise ValueError("its output is another one")


def _guesses(known: Architecture, seen: Recording) -> Iterator[Architecture]:
    """What the block may be, the most first."""
    first = next(chain(_plain(known, seen), _post_norm(known, seen)), None)
    if first is None:
        return
    whole = _with_flat(replace(first, **_inside(first, seen)), seen)
    for guess in (whole, replace(whole, adds_in_place=True)):
        yield guess
        for without in ("mlp_projection", "attn_projection", "mlp"):
            guess = replace(guess, **{without: ""})
            yield guess


def _with_flat(guess: Architecture, seen: Recording) -> Architecture:
    """With the sites whose tensors the block keeps as [batch · seq, d]."""
    flat = tuple(
        site
        for site, (path, side) in guess.places.items()
        if (path if side == "output" else f"{path}<") in seen.flat
    )
    return replace(guess, flattens=flat)


def _plain(known: Architecture, seen: Recording) -> Iterator[Architecture]:
    for name, scale in {"": 1.0, **seen.numbers}.items():
        for first, a in reversed(seen.outputs.items()):
            later = list(seen.outputs)[list(seen.outputs).index(first) + 1 :]
            for second in reversed(later):
                total = seen.x + scale * (a + seen.outputs[second])
                if not same(total, seen.y):
                    continue
                middle = seen.given(seen.x + scale * a)
                yield replace(
                    known,
                    attn_out=first,
                    mlp_out=second,
                    resid_mid=(middle, "input") if middle else None,
                    write_scale=name,
                )


def _post_norm(known: Architecture, seen: Recording) -> Iterator[Architecture]:
    last = [
        n for n in seen.inputs if n in seen.outputs and same(seen.outputs[n], seen.y)
    ]
    for norm in seen.inputs:
        if norm not in seen.outputs:
            continue
        for first, a in reversed(seen.outputs.items()):
            if not same(seen.x + a, seen.inputs[norm]):
                continue
            for second, m in reversed(seen.outputs.items()):
                total = seen.outputs[norm] + m
                end = next((n for n in last if same(total, seen.inputs[n])), None)
                if end is not None:
                    yield replace(
                        known,
                        attn_out=first,
                        mlp_out=second,
                        resid_mid=(norm, "output"),
                        norms_after=(norm, end),
                    )


def _inside(guess: Architecture, seen: Recording) -> dict[str, Any]:
    """The last projections and the MLP's input, where there are such modules."""
    stream = seen.x  # of parallel blocks
    if guess.resid_mid is not None:
        path, side = guess.resid_mid
        stream = (seen.inputs if side == "input" else seen.outputs)[path]
    attention, mlp = seen.outputs[guess.attn_out], seen.outputs[guess.mlp_out]
    return {
        "attn_projection": seen.last_linear(attention),
        "mlp_projection": seen.last_linear(mlp),
        "mlp": seen.reader(mlp, stream),
    }


def _unknown(model: nn.Module, why: str) -> EquivError:
    return UnsupportedModelError(
        f"No architecture entry for `{type(model).__name__}` (model type "
        f"{model_type(model)!r}), and {why}. Known are {', '.join(sorted(TABLE))}. Add "
        "its line to `equiv.model.known_families.TABLE`."
    )
