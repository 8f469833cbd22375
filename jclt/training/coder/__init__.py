"""Training a sparse coder."""
