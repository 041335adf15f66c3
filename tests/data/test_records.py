"""What may stand in the files, and the message, with its line, for everything else."""

import json
from pathlib import Path

import pytest

from ratel.data.sources import corpus as corpus_module
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.files import MAX_LINE_BYTES, find_sources
from ratel.data.sources.records import Chat, Completion, Text
from ratel.errors import RatelError

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def said(**keys: object) -> dict[str, object]:
    """A conversation whose answer has further keys."""
    return {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], **keys}]}


def called(*ids: str) -> dict[str, list[object]]:
    calls = [{"id": id_, "function": {"name": "f", "arguments": "{}"}} for id_ in ids]
    return {"messages": [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": calls}]}


def write(path: Path, *lines: object) -> Path:
    """A .jsonl file: objects as JSON, bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read_all(data: object, **options: int) -> list[object]:
    corpus = Corpus(find_sources(data), **options)
    return [corpus.read(number) for number in range(len(corpus))]


def test_the_three_kinds_of_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "ünïcode", "id": 7}, {"prompt": "p", "completion": "c"}, CHAT)
    assert read_all(path) == [Text(text="ünïcode"), Completion(prompt="p", completion="c"),
                              Chat(messages=tuple(CHAT["messages"]))]


def test_blank_lines_and_blank_texts_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"", {"text": "  "}, {"text": "one"}, b"   ", {"text": ""}, {"text": "two"})
    assert read_all(path) == [Text(text="one"), Text(text="two")]


def test_a_last_line_without_newline_a_mark_at_the_start_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    assert read_all(path) == [Text(text="one"), Text(text="two")]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert read_all(tmp_path / "b.txt") == [Text(text="first\nsecond")]


BAD_LINES = [
    (b'{"text": "unclosed', "not valid JSON"),
    (b'["text"]', "a JSON object is expected, not a list"),
    (b'"text"', "not a string"),
    (b"\xff\xfe", "not UTF-8: byte 0xff"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "a number has too many digits"),
    ({"content": "x", "id": 1}, 'no key that is known here; the object has "content", "id"'),
    ({}, "no keys at all"),
    ({"text": 5}, '"text" must be a string, not a number'),
    ({"text": None}, "not null"),
    ({"prompt": "x"}, '"prompt" without "completion"'),
    ({"completion": "x"}, '"completion" without "prompt"'),
    ({"prompt": "x", "completion": ["y"]}, '"completion" must be a string, not a list'),
    ({"prompt": "x", "completion": " "}, '"completion" is empty'),
    ({"text": "x", **CHAT}, "more than one kind of record"),
    ({"messages": []}, "not empty"),
    ({"messages": "hello"}, "must be a list"),
    ({"messages": ["hello"]}, 'message 1 is not an object with "role"'),
    ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
    ({"messages": [*CHAT["messages"], {"role": "robot", "content": "x"}]}, "message 3 has the unknown role 'robot'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'part 1 of "content" is of the type "image"'),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, 'part 2 of "content" is not a text'),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, '"text" must be a string, not a number'),
    ({"messages": [{"role": "user", "content": {}}]}, '"content" must be a string, not an object'),
    (said(weight=0.5), 'message 2: "weight" is 0.5'),
    (said(weight=True), 'message 2: "weight" is true'),
    (said(train=1), '"train" must be true or false, not a number'),
    (said(weight=0, train=True), "contradict each other"),
    (said(weight=0), "so there is nothing to learn"),
    (said(train=False), "so there is nothing to learn"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}, *CHAT["messages"]]}, 'has the role "user"'),
    (said(function_call={"name": "f", "arguments": ""}), 'message 2 has "function_call"'),
    (said(audio={"id": "x"}), 'message 2 has "audio"'),
    (said(reasoning_content=["x"]), 'message 2: "reasoning_content" must be a string'),
    (said(name=5), 'message 2: "name" must be a string'),
    (said(tool_calls={"name": "f"}), '"tool_calls" must be a list, not an object'),
    (said(tool_calls=[{"type": "function"}]), "tool call 1 names no function"),
    (said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "the arguments of tool call 1 are no JSON object"),
    (said(tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments of tool call 1 are no JSON object"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "Only the assistant calls tools"),
    ({"messages": [*called("a", "b")["messages"], {"role": "tool", "content": "x", "tool_call_id": "c"}]},
     'message 4 has the "tool_call_id" "c"'),
    ({"messages": [*called("a", "b")["messages"], *({"role": "tool", "content": "x", "tool_call_id": id_} for id_ in "ba")]},
     "message 5 answers a tool call that stands before the one answered last"),
    ({"messages": [{"role": "user", "content": "x"}]}, 'no message has the role "assistant"'),
    ({**CHAT, "tools": "x"}, '"tools" must be a list'),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("checked_first", [True, False])
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: object, message: str,
                             checked_first: bool) -> None:
    """Whether found by the check before training or, beyond what is checked, when it is read."""
    path = write(tmp_path / "bad.jsonl", {"text": "fine"}, b"", {"text": " "}, line, {"text": "fine"})
    if not checked_first:
        monkeypatch.setattr(corpus_module, "CHECKED_BYTES", 0)
    with pytest.raises(RatelError) as caught:
        read_all(path)
    assert f"{path}, line 4: " in str(caught.value) and message in str(caught.value)
    assert caught.value.field == "data" and caught.value.remedy


@pytest.mark.parametrize("checked_first", [True, False])
def test_bad_utf8_in_a_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked_first: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nthr\xe9e\n")
    if not checked_first:
        monkeypatch.setattr(corpus_module, "CHECKED_BYTES", 0)
    with pytest.raises(RatelError, match="a.txt, line 4: not UTF-8: byte 0xe9 at column 4"):
        read_all(path)


def test_a_line_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_LINE_BYTES >= 1 << 20
    monkeypatch.setattr("ratel.data.sources.files.MAX_LINE_BYTES", 100)
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, {"text": "x" * 200})
    with pytest.raises(RatelError, match="line 2: the line is longer"):
        read_all(path)


def test_directories_are_sorted_recursive_and_without_other_files(tmp_path: Path) -> None:
    for name in ("b/two.txt", "a/z/one.txt", "c.TXT", ".hidden/no.txt", "b/.no.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert [record.text for record in read_all(tmp_path)] == ["a/z/one.txt", "b/two.txt", "c.TXT"]
    listed = [tmp_path / "c.TXT", str(tmp_path / "a")]
    assert [record.text for record in read_all(listed)] == ["c.TXT", "a/z/one.txt"]


def test_what_is_not_there_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "dir").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    for data, message in ((tmp_path / "empty.txt", "no text"), (tmp_path / "dir", "no .txt or .jsonl file"),
                          (tmp_path / "data.csv", "not a kind of file"), (tmp_path / "absent.txt", "cannot be opened"),
                          (tmp_path / "absent", "cannot be opened"), ([], "list is empty")):
        with pytest.raises(RatelError, match=message) as caught:
            read_all(data)
        assert caught.value.field == "data"


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one"})
    corpus = Corpus(find_sources(path))
    path.unlink()
    with pytest.raises(RatelError, match="cannot be read.*a.jsonl"):
        corpus.read(0)


def test_paragraphs_are_gathered_and_none_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"{number}: " + "word " * (number % 50) + "end" for number in range(300)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(paragraphs) + "\n")
    texts = [record.text for record in read_all(tmp_path, text_bytes=1000)]
    assert [part for text in texts for part in text.split("\n\n\n")] == paragraphs
    assert all(1000 <= len(text) + 3 < 1000 + 300 for text in texts[:-1])


@pytest.mark.parametrize("character", ["x", "é", "語", "😀"])
def test_text_without_lines_or_spaces_is_cut_between_characters(tmp_path: Path, character: str) -> None:
    whole = "a" + character * 20_000
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    texts = [record.text for record in read_all(tmp_path, text_bytes=1000)]
    assert "".join(texts) == whole
    assert len(texts) > 3 and max(len(text.encode()) for text in texts) <= 5000


def test_a_long_line_is_cut_between_words(tmp_path: Path) -> None:
    whole = " ".join(f"word{number}" for number in range(5000))
    (tmp_path / "a.txt").write_text(whole)
    texts = [record.text for record in read_all(tmp_path, text_bytes=1000)]
    assert len(texts) > 3 and "".join(texts) == whole
    assert all(text.endswith(" ") for text in texts[:-1])
