"""``qconv`` and ``python -m qconv``."""

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Entry point of a process of its own.

    Imports are inside, as ctrl-C is answered in the same way from here on.
    """
    try:
        from qconv.own_process import leave, leave_out_unused

        leave_out_unused()
        from qconv.cli import main

        try:
            main()
        except SystemExit as stop:
            if stop.code is not None and not isinstance(stop.code, int):  # a message, which the interpreter writes
                raise
            code = stop.code or 0
        else:
            code = 0
        leave(code)
    except KeyboardInterrupt:  # while something was imported; commands answer it themselves
        sys.stderr.write("\ninterrupted: nothing was left behind\n")  # after a terminal's ^C
        sys.exit(130)


if __name__ == "__main__":
    run()
