"""`equiv`: the commands, their arguments and their exit status.

The status is 0 when what was asked for is met, 1 when it is not (or could not be
decided), 2 for wrong usage or data.
"""

import sys
from collections.abc import Sequence

from equiv.errors import EquivError

OK, NOT_MET, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Example:
        >>> main(["check", "--help"])  # doctest: +ELLIPSIS
        <BLANKLINE>
        ...
        0
    """
    try:
        from equiv.cli.commands import app
    except ImportError as error:
        print(f"The command line needs more: pip install 'equiv[cli]' ({error})")
        return USAGE
    import click

    try:
        status = app(args=None if argv is None else list(argv), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        print("Stopped; nothing was written.", file=sys.stderr)
        return USAGE
    except EquivError as error:
        print(f"equiv: {error}", file=sys.stderr)
        return USAGE
    return status if isinstance(status, int) else OK


if __name__ == "__main__":
    sys.exit(main())
