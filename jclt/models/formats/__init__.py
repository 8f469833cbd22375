"""Language models on disk."""
