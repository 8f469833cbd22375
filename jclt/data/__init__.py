"""What is trained and measured on: documents, tokens, stored activations."""
