"""One stage of a model: what it has, takes and gives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Attributes:
        name: "embed", "block", "bridge", "head" or "module".
        layer: Index of the block; the number of blocks for the head, else −1.
        names: Full names of its parameters and buffers.
        sites: Sites inside it whose activations it returns.
        output: The name its output goes by among the activations.
        encodes: Whether its tokens are those of an encoder before a decoder.
    """

    name: str
    layer: int
    names: tuple[str, ...]
    sites: tuple[str, ...]
    output: str
    encodes: bool = False
