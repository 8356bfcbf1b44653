"""``qconv`` and ``python -m qconv``."""

from qconv.cli import main
from qconv.own_process import leave, leave_out_unused


def run() -> None:
    """Entry point of a process of its own."""
    leave_out_unused()
    try:
        main()
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):  # a message, which the interpreter writes
            raise
        code = stop.code or 0
    else:
        code = 0
    leave(code)


if __name__ == "__main__":
    run()
