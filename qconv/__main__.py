"""``qconv`` and ``python -m qconv``."""

from qconv.cli import main
from qconv.own_process import leave_out_unused


def run() -> None:
    """Entry point of a process of its own."""
    leave_out_unused()
    main()


if __name__ == "__main__":
    run()
