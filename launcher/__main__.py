"""Command line as a module: `python -m gigabatch.launcher`."""

from gigabatch.launcher.cli.app import main

main()
