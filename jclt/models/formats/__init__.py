"""Language models on disk: published families, `config.json`, tensors."""
