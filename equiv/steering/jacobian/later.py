"""The later site at which a steer is to bring about a shift."""

from dataclasses import dataclass

from equiv.errors import SiteError
from equiv.model.sites import FLOW, LOGITS, OUTPUT, Site, as_site_key
from equiv.model.stages import StagedModel


@dataclass(frozen=True)
class Later:
    """A site of the steer's own layer, of a fixed layer, or the model's output.

    Attributes:
        site: Its name; "logits" or "output" for what the model returns.
        layer: Its layer; `None` for the layer of the steer itself.
    """

    site: str
    layer: int | None = None

    @property
    def is_output(self) -> bool:
        """Whether it is what the model returns."""
        return self.layer is None and self.site in (LOGITS, OUTPUT)

    @property
    def is_fixed(self) -> bool:
        """Whether it is one and the same place for the steers of all layers."""
        return self.is_output or self.layer is not None

    @property
    def captured(self) -> tuple[str, ...]:
        """The site inside a block that has to be looked at, if it is one."""
        return () if self.is_output else (self.site,)

    @property
    def key(self) -> str:
        """As text.

        Example:
            >>> Later("mlp_out").key, Later("block_out", 3).key
            ('mlp_out', '3.block_out')
        """
        return self.site if self.layer is None else f"{self.layer}.{self.site}"

    def place(self, cut: StagedModel, layer: int) -> tuple[int, str]:
        """(layer, name) of it for a steer in `layer`.

        Raises:
            SiteError: If the model has no such site.
        """
        if not self.is_output:
            end = layer if self.layer is None else self.layer
            cut.check_site(end, self.site)
            return end, self.site
        if self.site == LOGITS != cut.output_site:
            raise SiteError(
                f"{type(cut.model).__name__} returns no logits: pass at={OUTPUT!r}."
            )
        return cut.num_layers if cut.blocks else 0, cut.output_site


def as_later(at: object) -> Later:
    """A later site from its name, or from a pair (layer, site).

    Raises:
        SiteError: If it is neither.

    Example:
        >>> as_later("hook_mlp_out"), as_later((3, "block_out")).key
        (Later(site='mlp_out', layer=None), '3.block_out')
    """
    if isinstance(at, Site) or (isinstance(at, str) and not at.startswith("blocks.")):
        return Later(at.write if isinstance(at, Site) else Site(at).write)
    layer, site = as_site_key(at)
    return Later(Site(site).write, layer)


def is_later(cut: StagedModel, layer: int, site: str, later: Later) -> bool:
    """Whether it is computed after what a steer writes.

    A module without blocks does not say in which order it calls its submodules.
    """
    write = Site(site).write
    end, name = later.place(cut, layer)
    if cut.blocks is None:
        return name != write
    if end != layer:
        return end > layer
    return FLOW.index(name) > FLOW.index(write)


def check_later(cut: StagedModel, layer: int, site: str, later: Later) -> None:
    """Refuse a later site that is not.

    Raises:
        SiteError: If it is computed before what the steer writes.
    """
    cut.check_site(layer, site)
    if not is_later(cut, layer, site, later):
        raise SiteError(
            f"Expected `at` to come after {Site(site).write} of layer {layer}, got "
            f"{later.key}. What is added at a site itself needs no Jacobian: use "
            "`equiv.fit_sequential`."
        )
