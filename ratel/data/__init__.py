"""Text files to batches of packed sequences. See docs/data.md."""

from ratel.data.dataset import Batch, Dataset, open_dataset
from ratel.data.tokens.tokenizer import DEFAULT_CHAT_TEMPLATE, byte_level_tokenizer, check_vocab, has_tokenizer, load_tokenizer, tokenizer_source

__all__ = ["Batch", "DEFAULT_CHAT_TEMPLATE", "Dataset", "byte_level_tokenizer", "check_vocab", "has_tokenizer", "load_tokenizer",
           "open_dataset", "tokenizer_source"]
