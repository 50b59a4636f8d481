"""Start and supervision of runs: command line, checks, Ray, torchrun, inline."""
