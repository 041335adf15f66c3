"""Adapters (LoRA): what they are, which layers they are put on, how they begin, their files, and
merging (docs/lora.md)."""
