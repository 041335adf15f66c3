"""Tokenizers found or made, and the tokens of each kind of record."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ratel.data import DEFAULT_CHAT_TEMPLATE, byte_level_tokenizer, check_vocab, load_tokenizer
from ratel.data.batches.encode import Encoder
from ratel.data.sources.records import Completion, Text
from ratel.errors import RatelError

pytestmark = pytest.mark.unit

BOS, EOS, PAD = 256, 257, 258


def word_tokenizer(*, bos: bool = True, **options: object) -> PreTrainedTokenizerFast:
    """Words as tokens, with a post-processor that adds BOS and EOS, as some published tokenizers
    do."""
    words = ["<s>", "</s>", "<unk>", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                                 special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   **options)


def random_text(rng: random.Random) -> str:
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 80)))


def test_bytes_are_the_ids_and_come_back() -> None:
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer) == 259
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(200)]
    texts += ["".join(map(chr, range(0x250))), " leading, trailing ", "a\r\n\tb ' s n't", "e\u0301 \ufeff \u2028"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == list(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3", "gpt2", "gemma", "mixtral"])
def test_an_exported_byte_level_tokenizer_is_the_same_anywhere(tmp_path: Path, model_type: str | None) -> None:
    """AutoTokenizer lets the model type choose the class for some families; the ids must not change
    with it."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "Grüße, 世界 😀\n  def f(): don't <|eos|>"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
        assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS, PAD)
        assert loaded.chat_template == DEFAULT_CHAT_TEMPLATE


def test_which_tokenizer_belongs_to_a_model(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path / "with")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "config.json").write_text("{}")
    assert len(load_tokenizer(tmp_path / "with")) == len(load_tokenizer(str(tmp_path / "with"))) == 7
    for model in (None, tmp_path / "without", "llama-tiny", torch.nn.Linear(2, 2)):
        assert len(load_tokenizer(model)) == 259
    instance = torch.nn.Linear(2, 2)
    instance.config = type("Config", (), {"_name_or_path": str(tmp_path / "with")})()
    assert len(load_tokenizer(instance)) == 7


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(RatelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_the_vocabulary_must_hold_the_ids(tmp_path: Path) -> None:
    check_vocab(byte_level_tokenizer(), 259)
    with pytest.raises(RatelError, match="ids up to 258, the model's vocabulary ends at 257"):
        check_vocab(byte_level_tokenizer(), 258)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<image>"])
    check_vocab(tokenizer, 7)
    with pytest.raises(ValueError, match="'<image>' has id 7"):
        Encoder(tokenizer, vocab_size=7).encode(Text(text="a <image>"))
    Encoder(tokenizer, vocab_size=8).encode(Text(text="a <image>"))


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RatelError, match="no end-of-text token"):
        Encoder(tokenizer)


def test_text_and_completion_are_closed_once() -> None:
    encoder = Encoder(word_tokenizer())
    text = encoder.encode(Text(text="a b"))
    assert text.ids.tolist() == [0, 3, 4, 1] and text.targets.all() and not text.whole
    assert encoder.encode(Text(text="<s> a b </s>")).ids.tolist() == [0, 3, 4, 1]
    answer = encoder.encode(Completion(prompt="a b", completion="c d"))
    assert answer.ids.tolist() == [0, 3, 4, 5, 6, 1] and answer.whole
    assert answer.targets.tolist() == [False, False, False, True, True, True]
    assert Encoder(word_tokenizer(bos=False)).encode(Text(text="a")).ids.tolist() == [3, 1]


def test_the_boundary_of_a_completion_is_exact() -> None:
    document = Encoder(byte_level_tokenizer()).encode(Completion(prompt="né", completion="é😀"))
    assert bytes(document.ids[document.targets][:-1].tolist()) == "é😀".encode()
    assert document.ids[0] == BOS and document.ids[-1] == EOS and document.targets[-1]
    empty = Encoder(byte_level_tokenizer()).encode(Completion(prompt="", completion="x"))
    assert empty.ids.tolist() == [BOS, ord("x"), EOS] and empty.targets.tolist() == [False, True, True]
