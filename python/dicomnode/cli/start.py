"""Where the command `dicomnode` starts: Ctrl-C while Python still imports ends it without a word."""

import signal


def main() -> None:
    """Import what the command needs, and run it."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dicomnode.cli.main import main as run

    signal.signal(signal.SIGINT, interrupt)
    run()
