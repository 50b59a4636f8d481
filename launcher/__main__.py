"""`python -m gigabatch.launcher` is the command line."""

from gigabatch.launcher.cli.app import main

main()
