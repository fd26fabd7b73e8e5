"""Which column of the ladder a row belongs to.

Fitted steering has a column per pair of sites that it reads and writes. Oracles read
nothing, so a row of theirs belongs to every column that writes there.
"""

from collections.abc import Sequence

from equiv.model.sites import Site
from equiv.report.values import Behaviour


def columns(rows: Sequence[Behaviour]) -> list[str]:
    """The pairs that were fitted, as `Site.key`, in their order."""
    return list(dict.fromkeys(row.site for row in rows if row.reads))


def columns_of(row: Behaviour, sites: Sequence[str]) -> list[str]:
    """The columns that a row is shown in."""
    if row.reads:
        return [row.site]
    return [site for site in sites if Site(site).write == row.writes]
