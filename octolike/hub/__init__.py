"""Runs in other places: a Hugging Face hub repository, a bucket, a directory; with a model card."""
