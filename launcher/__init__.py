"""Starting and supervising runs: command line, checks, Ray, torchrun, inline."""
