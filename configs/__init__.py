"""Recipes: ready configurations, every key explained where it is set."""
