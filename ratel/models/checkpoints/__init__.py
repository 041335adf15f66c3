"""Hugging Face directories, read and written as transformers does: names, conversions, dtypes,
ties, and what lies beside."""
