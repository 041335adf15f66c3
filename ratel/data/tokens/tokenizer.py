"""The tokenizer of a model's directory, or a byte-level one where there is none."""

import os
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratel.config import TOKENS
from ratel.errors import RatelError
from ratel.reading import NotRegularError, refuse_odd_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
                    "spiece.model", "tekken.json")
_BOS, _EOS, _PAD = "<|bos|>", "<|eos|>", "<|pad|>"

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""For tokenizers that bring none: ``<|role|>``, the content on the next lines, and EOS after each
answer."""


def load_tokenizer(model: object = None, **options: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a model.

    A directory with tokenizer files, or a model instance that was loaded from one, gives that
    tokenizer. Everything else (a directory without one, a preset's name, a module, None) gives the
    byte-level one of 259 tokens. ``options``: of the tokenizer in the directory.
    """
    directory = _directory_of(model)
    if directory is None or not has_tokenizer(directory):
        return byte_level_tokenizer()
    from transformers import AutoTokenizer
    try:
        refuse_odd_entries(directory)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **options)
        affixes(tokenizer)  # what is wrong with an option shows when it is used
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever broken files make many parsers raise; panics of Rust are no Exceptions
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, NotRegularError) else f"{type(error).__name__}: {error}"
        raise RatelError(f"its tokenizer cannot be loaded ({reason[:400]})", field="model", value=directory,
                         remedy="Repair the tokenizer's files, or remove them to train on plain bytes") from error


def load_for(task: str, source: object) -> "tuple[PreTrainedTokenizerBase, OwnTokenizer | None]":
    """As `load_tokenizer`, and `own_tokenizer`. For words that come one by one the space before
    each, which is a part of a word's first token, is put back where the tokenizer has it as an
    option; it is not as in the directory then."""
    tokenizer = load_tokenizer(source)
    if task == TOKENS and getattr(tokenizer, "add_prefix_space", None) is False:
        return load_tokenizer(source, add_prefix_space=True), None
    return tokenizer, own_tokenizer(source, tokenizer)


@dataclass(frozen=True, kw_only=True)
class OwnTokenizer:
    """A tokenizer is that of the model's directory, whose files go along with the weights byte for
    byte."""

    chat_template: Any
    """As it was read."""


def own_tokenizer(model: object, tokenizer: "PreTrainedTokenizerBase") -> OwnTokenizer | None:
    """Whether ``tokenizer``, as `load_tokenizer` has just returned it for ``model``, is that of a
    directory."""
    is_directory = isinstance(model, (str, os.PathLike)) and os.path.isdir(model)
    return OwnTokenizer(chat_template=tokenizer.chat_template) if is_directory and has_tokenizer(model) else None


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path, own: OwnTokenizer | None) -> None:
    """Put a tokenizer into an exported model. Of one whose files are there already only a chat
    template is written, if it has come to have another."""
    if own is not None and tokenizer.chat_template == own.chat_template:
        return
    if own is not None and isinstance(tokenizer.chat_template, str):
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    else:
        tokenizer.save_pretrained(directory)


def tokenizer_source(tokenizer: str | os.PathLike[str] | None, model: object) -> object:
    """What to load a tokenizer from: the directory that is named for it, or the model."""
    if tokenizer is not None and not os.path.isdir(tokenizer):
        raise RatelError("is not a directory", field="--tokenizer", value=tokenizer)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise RatelError("holds no tokenizer", field="--tokenizer", value=tokenizer,
                         remedy="Give the directory that tokenizer.json lies in, or leave the option out")
    return model if tokenizer is None else tokenizer


def has_tokenizer(directory: "str | os.PathLike[str]") -> bool:
    return any((Path(directory) / name).exists() for name in _TOKENIZER_FILES)


def byte_level_tokenizer() -> "PreTrainedTokenizerBase":
    """Ids 0 to 255 are the bytes of UTF-8, then BOS, EOS and PAD. Saved, it loads with
    AutoTokenizer anywhere."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    # use_regex off: splitting into words first is for merges, and there are none.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (_BOS, _EOS, _PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD,
                                   clean_up_tokenization_spaces=False, chat_template=DEFAULT_CHAT_TEMPLATE)


def check_vocab(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for.

    Added tokens beyond the model's vocabulary are let pass, because published text-only models
    carry them (image markers, say); the encoder refuses a document in which one appears.
    """
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    added = set(added_tokens(tokenizer).values()) - used
    largest = max(id_ for id_ in tokenizer.get_vocab().values() if id_ not in added)
    if largest >= vocab_size:
        raise RatelError(f"the tokenizer makes ids up to {largest}, the model's vocabulary ends at {vocab_size - 1}",
                         field="model", remedy=f"Use a model with vocab_size of at least {largest + 1} (the byte-level "
                                               "tokenizer needs 259), or the tokenizer that belongs to the model")


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Tokens beside the vocabulary proper, as markers, with their ids."""
    if hasattr(tokenizer, "get_added_vocab"):
        return tokenizer.get_added_vocab()
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))  # of mistral-common


_SAMPLE = "Two  words, \t(1234) déjà-vu\r\n\n 語。 don't <x> A_b ½"


def fingerprint(tokenizer: "PreTrainedTokenizerBase", *, renders: bool) -> str:
    """What it makes of texts, as a digest: its vocabulary, the tokens of a sample, and
    (``renders``) its chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
    content = ["\0".join(token for token, _ in vocabulary), affixes(tokenizer), tokenizer(_SAMPLE)["input_ids"],
               [tokenizer.eos_token_id, tokenizer.pad_token_id], str(tokenizer.chat_template) if renders else ""]
    return blake2b(repr(content).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text (BOS, if any)."""
    return affixes(tokenizer)[0]


def affixes(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text and after it."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start:start + len(bare)] == bare:
            return full[:start], full[start + len(bare):]
    return [], []


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise RatelError("the tokenizer has no end-of-text token, which must close every document", field="model",
                         remedy='Set "eos_token" in its tokenizer_config.json')
    return tokenizer.eos_token_id


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """PAD, or EOS where there is none; nothing is ever learned from either."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _directory_of(model: object) -> Path | None:
    if not isinstance(model, (str, os.PathLike)):
        model = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(model) if isinstance(model, (str, os.PathLike)) and model != "" and Path(model).is_dir() else None


def _byte_symbols() -> list[str]:
    """The character by which the ByteLevel pre-tokenizer stands for each byte: itself where it
    prints, else 256 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
