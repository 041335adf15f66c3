"""A long text is tokenised in parts: the tokens are those of the whole, for every kind of
tokenizer, or it is not cut."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ratel.data.batches import stream
from ratel.data.batches.encode import Encoder
from ratel.data.batches.forms import Packed
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.files import find_sources
from ratel.data.sources.records import Chat, Completion, Text
from ratel.data.tokens import pieces
from ratel.data.tokens.pieces import Pieces
from ratel.data.tokens.places import LINES, SIGNS, WORDS, parts_of, places_of
from ratel.data.tokens.tokenizer import byte_level_tokenizer
from tests.data.chat.test_pieces import TOKENIZERS, metaspace

pytestmark = pytest.mark.unit

LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS_OF_TEXT = ("two four and six the answer ab Éa жизнь 語 好的 한국 1 23 ... , . ! ? :) \n \n\n <s> </s> é ( [x] --- ' 's don't \" 。 ， mask "
                 "AB aB").split(" ")
CORPUS = [" ".join(random.Random(seed).choices(WORDS_OF_TEXT, k=40)) for seed in range(40)]


def some_text(seed: int, words: int) -> str:
    chosen = random.Random(seed)
    gaps = [" ", " ", " ", " ", "  ", "", "\n", "\n\n", "\t", " \n ", "\r\n"]
    return "".join(chosen.choice(WORDS_OF_TEXT) + chosen.choice(gaps) for _ in range(words))


def made(model: Any, trainer: Any, *, normalizer: Any = None, splitter: Any = None, added: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def bpe(**options: Any) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **options)


def in_bytes(*before: Any, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    """Splitters, then the bytes of each split: Llama 3's way and that of most others."""
    splitter = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return made(models.BPE(), bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), normalizer=normalizer, splitter=splitter, added=added)


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior)


def unsplit(normalizer: Any, splitter: Any = None, *, model: dict[str, Any] | None = None) -> PreTrainedTokenizerFast:
    """Tokens are trained on words; text is then tokenised without being split (Llama 2's and
    Gemma's files)."""
    trained = made(models.BPE(unk_token="<unk>", fuse_unk=True), bpe(), splitter=pre_tokenizers.Metaspace(prepend_scheme="always"))
    backend = trained.backend_tokenizer
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter or pre_tokenizers.Sequence([])
    for name, value in (model or {}).items():
        setattr(backend.model, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def to_symbols(*more: Any) -> Any:
    return normalizers.Sequence([*more, normalizers.Replace(" ", "▁")])


def bert() -> PreTrainedTokenizerFast:
    return made(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
                normalizer=normalizers.BertNormalizer(), splitter=pre_tokenizers.BertPreTokenizer())


def clip() -> PreTrainedTokenizerFast:
    return made(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), bpe(end_of_word_suffix="</w>"), splitter=split(r"\w+|[^\s\w]+", "isolated"),
                normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]))


ALL = [WORDS, LINES, SIGNS]
KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], list[Any]]] = {
    "llama 3": (lambda: in_bytes(split(LLAMA_3)), ALL),
    "numbers and lines first": (lambda: in_bytes(split(r"\p{N}{1,3}"), split(r"[一-龥]+"), split(LLAMA_3)), ALL),
    "nfc": (lambda: in_bytes(split(LLAMA_3), normalizer=normalizers.NFC()), ALL),
    "llama 2": (lambda: unsplit(to_symbols(normalizers.Prepend("▁"))), [WORDS, LINES]),
    "gemma": (lambda: unsplit(to_symbols(), pre_tokenizers.Split(" ", "merged_with_previous")), [WORDS, LINES]),
    "bert": (bert, ALL),
    "clip": (clip, ALL),
    "metaspace": (lambda: metaspace("first"), []),
    "unigram": (TOKENIZERS["unigram"], [WORDS]),
    "bytes": (TOKENIZERS["bytes with a space"], ALL),
    "bytes alone": (byte_level_tokenizer, [WORDS, LINES]),
    # What looks across some words:
    "quotes": (lambda: in_bytes(split(r'"[^"]*"'), split(LLAMA_3)), []),
    "brackets": (lambda: in_bytes(split(r"\([^)]*\)"), split(LLAMA_3)), []),
    "lines as a whole": (lambda: in_bytes(split(r"\n+")), [LINES]),
    "words in pairs": (lambda: in_bytes(split(r"\p{L}+ \p{L}+|\s+|\S")), [LINES, SIGNS]),
    "a normalizer with an expression": (lambda: in_bytes(split(LLAMA_3), normalizer=normalizers.Replace(Regex("four and"), "and")), []),
    "an added token of two words": (lambda: in_bytes(split(LLAMA_3), added=(AddedToken("two four"),)), [LINES, SIGNS]),
    "an added token that takes spaces": (lambda: in_bytes(split(LLAMA_3), added=(AddedToken("mask", lstrip=True),)), []),
    "unknown characters become one": (lambda: unsplit(normalizers.Replace(" ", "_")), [LINES]),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LONG", 60)
    monkeypatch.setattr(pieces, "PIECE", 30)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_have_the_tokens_of_the_whole(kind: str, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make, places = KINDS[kind]
    tokenizer = make()
    assert [p.probe for p in places_of(tokenizer)] == [p.probe for p in places]
    cut = Pieces(tokenizer)
    for seed in range(12):
        text = some_text(seed, 300)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert cut.first(text).tolist() == whole
        if places:
            assert len(list(parts_of(text, places, 30))) > 5
        continued = cut.next(text).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "LONG", 1 << 20)
            assert continued == cut.next(text).tolist()


def test_a_text_without_a_place_is_one_part(small_pieces: None, caplog: pytest.LogCaptureFixture) -> None:
    assert [part.text for part in parts_of("a" * 100 + " b " + "c" * 50, ALL, 30)] == ["a" * 100, " b", " " + "c" * 50]
    cut = Pieces(byte_level_tokenizer())
    assert len(cut.first("a" * 100)) == 100
    assert "100 characters of a text are tokenised at once, since no place" in caplog.text


def test_progress_is_said(small_pieces: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TELLS_AFTER_S", 0.0)
    Pieces(byte_level_tokenizer()).first("ab cd " * 20)
    assert caplog.messages[0] == "a text of 120 characters is tokenised in pieces: 0%"
    assert len(caplog.messages) == 5


@pytest.mark.parametrize("record", [Text(text=some_text(1, 200)), Completion(prompt=some_text(2, 100), completion=some_text(3, 100)),
                                    Chat(messages=({"role": "user", "content": some_text(4, 100).strip()},
                                                   {"role": "assistant", "content": some_text(5, 100).strip()}))])
def test_records_of_all_kinds(record: Any, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokenizer in (byte_level_tokenizer(), KINDS["llama 2"][0]()):
        tokenizer.chat_template = byte_level_tokenizer().chat_template
        in_parts = Encoder(tokenizer).encode(record)
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "LONG", 1 << 20)
            whole = Encoder(tokenizer).encode(record)
        assert in_parts.ids.tolist() == whole.ids.tolist() and in_parts.targets.tolist() == whole.targets.tolist()


@pytest.mark.parametrize("kind", ["llama 3", "bert", "bytes"])
def test_the_beginning_of_a_text_has_the_tokens_that_a_task_cuts_it_to(kind: str, small_pieces: None) -> None:
    tokenizer, text = KINDS[kind][0](), some_text(6, 400)
    beginning = Pieces(tokenizer).begin(text, 50)
    assert text.startswith(beginning) and len(beginning) < 0.5 * len(text)
    cut = [tokenizer(one, truncation=True, max_length=50)["input_ids"] for one in (text, beginning)]
    assert cut[0] == cut[1] and len(cut[0]) == 50
    assert Pieces(tokenizer).begin("ab cd", 50) == "ab cd"


def test_a_long_document_is_made_once_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LONG", 100)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": "ab " * n}) + "\n" for n in (5, 50, 60)))
    form = Packed(byte_level_tokenizer(), seq_len=32, vocab_size=None)
    made: list[int] = []
    encode = form.encode
    monkeypatch.setattr(form, "encode", lambda record: made.append(len(record.text)) or encode(record))
    reader = stream.Reader(Corpus(find_sources(tmp_path / "d.jsonl")), form)
    lengths = [len(reader.load(number)) for number in (1, 1, 0, 0, 1, 2, 2, 1)]
    assert lengths == [152, 152, 17, 17, 152, 182, 182, 152]
    assert made == [150, 15, 15, 180, 150]
