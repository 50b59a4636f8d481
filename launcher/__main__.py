"""Entry point of the command `gigabatch` and of `python -m gigabatch.launcher`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C during the imports ends the process without a traceback."""
    try:
        from gigabatch.launcher.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app.main()


if __name__ == "__main__":
    main()
