"""How a run starts: the command line, Ray, torchrun, this process."""
