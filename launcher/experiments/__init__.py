"""Small experiments that test the effects papers claim, with the real trainer."""
