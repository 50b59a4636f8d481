"""Entry point of the command `gigabatch` and of `python -m gigabatch.launcher`."""

import signal
import sys

from gigabatch.launcher.waiting import sign_of_life


def main() -> None:
    """Run the command line. Ctrl-C during the imports ends the process without a traceback."""
    with sign_of_life(sys.argv[1:]):
        try:
            from gigabatch.launcher.cli import app
        except KeyboardInterrupt:
            sys.exit(130)
        try:
            app.main()
        finally:
            # torch reports the death of a loader worker at every SIGCHLD, also during the exit.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


if __name__ == "__main__":
    main()
