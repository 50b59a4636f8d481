"""Small experiments that test the effects that papers claim, with the real trainer."""
