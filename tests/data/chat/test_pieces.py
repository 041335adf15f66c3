"""A completion follows its prompt: the tokens say what was written, with no space between, whatever
the tokenizer adds."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ratel.data import byte_level_tokenizer
from ratel.data.batches.encode import Encoder
from ratel.data.chat import ChatEncoder
from ratel.data.sources.records import Chat, Completion
from ratel.data.tokens.pieces import Pieces

pytestmark = pytest.mark.unit

CORPUS = ["two and two is four", "2+2=four 3+3=six", "the answer: four\nand six", "a b c . , ! two four"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
COMPLETIONS = [("2+2=", "four"), ("2+2=", " four"), ("2+2= ", "four"), ("two and", " two is four"), ("the answer:\n", "\nfour"),
               ("fo", "ur"), ("two ", "  four  "), ("a\n", "b"), ("two", "</s>"), ("x", "é語")]


def finish(tokenizer: Tokenizer, trainer: Any, *, special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def metaspace(scheme: str, split: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's way since transformers knows it (first), and T5's (always)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return finish(tokenizer, trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL + BYTES, show_progress=False))


def prepended() -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's file: the space is put there by the normalizer, again after every
    special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return finish(tokenizer, trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL + BYTES, show_progress=False))


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return finish(tokenizer, trainer)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({char for line in CORPUS for char in line} | set("é語▁"))
    return finish(tokenizer, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False,
                                                     initial_alphabet=alphabet))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "metaspace first": lambda: metaspace("first"), "metaspace always": lambda: metaspace("always", True),
    "metaspace never": lambda: metaspace("never"), "prepended": prepended, "unigram": unigram,
    "bytes with a space": lambda: byte_level(True), "bytes": lambda: byte_level(False), "bytes alone": byte_level_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_completion_decode_to_what_was_written(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = Encoder(tokenizer)
    for prompt, completion in COMPLETIONS:
        document = encoder.encode(Completion(prompt=prompt, completion=completion))
        border = int(document.targets.argmax())
        alone = tokenizer(prompt)["input_ids"]
        assert document.ids[:border].tolist() == alone, "the prompt is as at inference"
        ids = document.ids.tolist()
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id and completion != tokenizer.eos_token else ids
        assert decode(tokenizer, ids) == decode(tokenizer, alone) + completion, (name, prompt, completion)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_completion_without_a_prompt_is_a_text() -> None:
    tokenizer = metaspace("first")
    document = Encoder(tokenizer).encode(Completion(prompt="", completion="four"))
    assert document.ids.tolist() == [*tokenizer("four")["input_ids"], tokenizer.eos_token_id]


def test_a_tokenizer_that_loses_something_gets_no_space_either() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "<s>": 1, "</s>": 2, "two": 3, "four": 4, "=": 5, "##four": 6}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    assert Pieces(fast).next("Four").tolist() == [4] and Pieces(fast).next("FOUR = two").tolist() == [4, 5, 3]


class Slow:
    """A tokenizer that says nothing about characters: ids of texts and texts of ids, no more
    (SentencePiece's own, tekken)."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        assert not options.get("return_offsets_mapping")
        return {"input_ids": self._inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def __getattr__(self, name: str) -> Any:
        assert name not in ("backend_tokenizer", "_tokenizer", "encodings")
        return getattr(self._inner, name)


@pytest.mark.parametrize("name", ["metaspace first", "prepended", "bytes"])
def test_a_tokenizer_without_offsets_gives_the_same(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
                               " {{ m.content }}</s>{% endif %}{% endfor %}")
    talk = Chat(messages=tuple({"role": role, "content": content} for role, content in (
        ("user", "2+2="), ("assistant", "four"), ("user", "two"), ("assistant", " and two"))))
    ids, targets = ChatEncoder(tokenizer).encode(talk)
    slow_ids, slow_targets = ChatEncoder(Slow(tokenizer)).encode(talk)
    assert ids.tolist() == slow_ids.tolist() and targets.tolist() == slow_targets.tolist()
    starts = [index for index in range(1, len(ids)) if targets[index] and not targets[index - 1]]
    ends = [index for index in range(1, len(ids)) if targets[index - 1] and not targets[index]] + [len(ids)]
    said = [decode(tokenizer, ids[:end].tolist())[len(decode(tokenizer, ids[:start].tolist())):] for start, end in zip(starts, ends)]
    assert said == [" four</s>", "  and two</s>"]
    document = Encoder(Slow(tokenizer)).encode(Completion(prompt="2+2=", completion="four"))
    assert document.ids.tolist() == Encoder(tokenizer).encode(Completion(prompt="2+2=", completion="four")).ids.tolist()


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"metaspace never"}))
def test_the_prompt_of_every_turn_has_the_tokens_of_inference(name: str) -> None:
    """Also of those that put a space after each special token: the first of the second turn is one.
    (Left out: words that grow together over the border of an answer, once it is history; no
    sequence of both turns can have both.)"""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}two {{ m.content }} and{% else %}"
                               " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
    talk = [{"role": role, "content": content} for role, content in (
        ("user", "2+2="), ("assistant", "four"), ("user", "3+3="), ("assistant", "six"))]
    ids, targets = ChatEncoder(tokenizer).encode(Chat(messages=tuple(talk)))
    starts = [index for index in range(1, len(ids)) if targets[index] and not targets[index - 1]]
    for start, turn in zip(starts, (1, 3)):
        prompt = tokenizer.apply_chat_template(talk[:turn], add_generation_prompt=True, return_dict=False)
        assert ids[:start].tolist() == prompt
