"""Recipes that ship with gmn, found by name: `gmn meta-train quickstart`."""
