"""Generators of the embedded data, one per task: seeded, learnable, without leak between splits."""
