"""Figures, a module for each kind: runs to a table, and that to a picture. All that is drawn is in it."""
