"""Training of language models: settings, the loop, checkpoints, metrics, run folders. `coder` trains sparse coders."""
