"""`gigabatch data check` and `gigabatch data stats`: validity and content of a data set."""
