"""Hugging Face's formats: configuration, weights and the files of a tokenizer."""
