"""The two lists of blocks of an encoder–decoder, or the one of a stack by itself."""

from torch import nn

from equiv.errors import UnsupportedModelError
from equiv.model.blocks import Blocks, model_type, submodule
from equiv.model.known_pairs import Pair


def both_stacks(model: nn.Module, pair: Pair) -> Blocks:
    """The blocks of a model of such a family, whether it has both stacks or one.

    Raises:
        UnsupportedModelError: If there are none, or more.
    """
    found = _lists(model, pair.encoder.blocks)
    if len(found) == 1:
        ((path, blocks),) = found.items()
        crosses = submodule(blocks[0], pair.decoder.cross_out) is not None
        return Blocks(
            path, tuple(blocks), pair.decoder_alone if crosses else pair.encoder
        )
    ends = {
        side: [path for path in found if f".{path}".endswith(f".{side}.{known.blocks}")]
        for side, known in (("encoder", pair.encoder), ("decoder", pair.decoder))
    }
    if len(found) != 2 or not all(len(paths) == 1 for paths in ends.values()):
        raise UnsupportedModelError(
            f"Expected one list of blocks each at `encoder.{pair.encoder.blocks}` and "
            f"`decoder.{pair.decoder.blocks}` in {type(model).__name__} (model type "
            f"{model_type(model)!r}), got {', '.join(found) or 'none'}."
        )
    (first,), (second,) = ends.values()
    encoder = Blocks(first, tuple(found[first]), pair.encoder)
    modules = (*encoder.modules, *found[second])
    return Blocks(second, modules, pair.decoder, encoder)


def _lists(model: nn.Module, path: str) -> dict[str, nn.ModuleList]:
    return {
        name: module
        for name, module in model.named_modules()
        if f".{name}".endswith(f".{path}") and isinstance(module, nn.ModuleList)
    }
