"""`equiv`: the commands, their arguments and their exit status.

The status is 0 when what was asked for is met, 1 when it is not (or could not be
decided), 2 for wrong usage or data.
"""

import sys
from collections.abc import Sequence

from equiv.errors import EquivError

OK, USAGE = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Example:
        >>> main(["frobnicate"])  # "No such command", on standard error
        2
    """
    try:
        from equiv.cli.commands import app
    except ImportError as error:
        print(f"The command line needs more: pip install 'equiv[cli]' ({error})")
        return USAGE
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        app(args=None if argv is None else list(argv), prog_name="equiv")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else OK
    except EquivError as error:
        print(f"equiv: {error}", file=sys.stderr)
        return USAGE
    return OK


if __name__ == "__main__":
    sys.exit(main())
