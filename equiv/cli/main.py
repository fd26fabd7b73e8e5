"""`equiv`: the commands, their arguments and their exit status.

The status is 0 when what was asked for is met, 1 when it is not (or could not be
decided), 2 for wrong usage or data, 3 for an internal error, 130 when interrupted.
"""

import sys
import traceback
from collections.abc import Sequence

from equiv.errors import EquivError

OK, USAGE, INTERNAL, INTERRUPTED = 0, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Example:
        >>> main(["frobnicate"])  # "No such command", on standard error
        2
    """
    try:
        from equiv.cli.claims import app
    except ImportError as error:
        print(f"The command line needs more: pip install 'equiv[cli]' ({error})")
        return USAGE
    try:
        from transformers.utils import logging
        from typer import Exit

        logging.disable_progress_bar()
        app(args=None if argv is None else list(argv), prog_name="equiv")
    except SystemExit as left:
        # Typer itself leaves with 1, "not met", when a pipe breaks or input ends.
        asked = isinstance(left.__context__, Exit) or left.code != 1
        return left.code if asked and isinstance(left.code, int) else INTERNAL
    except EquivError as error:
        print(f"equiv: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return INTERNAL
    return OK


if __name__ == "__main__":
    sys.exit(main())
