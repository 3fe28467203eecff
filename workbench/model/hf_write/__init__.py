"""Writing a `config.json` that transformers reads: one function per model type."""
