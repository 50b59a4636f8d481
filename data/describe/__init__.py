"""`gigabatch data check` and `stats`: what a set holds, and whether it is sound."""
