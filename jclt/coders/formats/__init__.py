"""Sparse coders on disk: jclt's layout and those that others publish."""
