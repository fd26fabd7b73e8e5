"""What all pages share: how templates are rendered, and that nothing is forgotten."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from equiv.errors import MissingExtraError


def page(
    package: str, template: str, filters: dict[str, Callable[..., Any]], **values: Any
) -> str:
    """A page from a template in a package's folder `templates`.

    Args:
        package: The package, such as "equiv.report".
        template: Name of the file.
        filters: What the template calls by name.
        **values: What the template shows; a name that is missing is an error.

    Raises:
        MissingExtraError: If jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError(
            "HTML pages need jinja2: pip install 'equiv[report]'."
        ) from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(filters)
    source = files(package).joinpath(f"templates/{template}")
    return environment.from_string(source.read_text(encoding="utf-8")).render(**values)


def style() -> str:
    """The look that all pages share: that of the report's."""
    source = files("equiv.report").joinpath("templates/report.html.j2")
    text = source.read_text(encoding="utf-8")
    return text[text.index("<style>") + len("<style>") : text.index("</style>")]
