"""Reading a published `config.json`: one function per model type."""
