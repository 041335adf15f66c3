"""Conversations: rendered by a tokenizer's chat template, and what the assistant said in them."""

from ratel.data.chat.encoder import ChatEncoder

__all__ = ["ChatEncoder"]
