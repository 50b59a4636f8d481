"""Commands `gigabatch bench data`, `faults` and `objectives`."""
