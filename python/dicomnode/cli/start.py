"""Where the command `dicomnode` starts and ends: Ctrl-C while Python imports needs no traceback."""

import signal
import sys


def main() -> None:
    """Import what the command needs, and run it."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dicomnode.cli.main import main as run

    try:
        signal.signal(signal.SIGINT, interrupt)
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Python's own end is not worth a word either.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
