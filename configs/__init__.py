"""Recipes: configs for common tasks, with a comment for each key."""
