"""Sparse coders on disk: our own layout and those that others publish."""
