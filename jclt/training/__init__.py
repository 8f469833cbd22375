"""Training: data, the steps, the loop, checkpoints and metrics."""
