"""`gigabatch reproduce`: the papers' small experiments, through the real trainer."""
