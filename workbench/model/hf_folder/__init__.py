"""The files of a Hugging Face folder: names and shapes of tensors, shards, filling a model from them."""
