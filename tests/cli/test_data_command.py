"""``ratel data``: what is shown of a record, and that every bad line is found before training."""

import json
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture

from ratel.cli import main
from ratel.data import byte_level_tokenizer
from ratel.data.batches.encode import Encoder
from ratel.data.review.show import Viewer
from ratel.data.review.survey import open_survey

pytestmark = pytest.mark.unit

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
                     {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "No."}]}
# Writes something before the last answer only.
REWRITING = ("{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}[end]\n"
             "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    lines = [{"text": "one"}, {"prompt": "2+2=", "completion": "four"}, "", TALK]
    path.write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    return path


def run(capsys: CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["data", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_targets_stand_in_brackets_and_borders_are_shown(capsys: CaptureFixture[str], data: Path) -> None:
    status, out = run(capsys, data)
    assert status == 0
    assert f"{data}, line 1: text, 5 tokens, 4 targets\n<|bos|>[[one<|eos|>]]" in out
    assert '<|bos|>2+2=[[four<|eos|>]]\n  token 5: "2" "+" "2" "=" | "f" "o" "u" "r"' in out
    assert f"{data}, line 4: conversation" in out and "<|assistant|>\n[[Hello.<|eos|>]]\n<|user|>\nBye" in out
    assert out.endswith("3 records, 82 tokens, 20 targets; no bad line\n")


def test_the_parts_are_the_whole_record(capsys: CaptureFixture[str], data: Path) -> None:
    status, out = run(capsys, data, "--json", "--number", 1, "--line", 4)
    [record] = json.loads(out)["records"]
    [text] = record["texts"]
    assert status == 0 and record["line"] == 4
    assert [part["text"] for part in text["parts"] if part["is_target"]] == ["Hello.<|eos|>", "No.<|eos|>"]
    whole = "".join(part["text"] for part in text["parts"])
    assert whole == "<|bos|><|user|>\nHi\n<|assistant|>\nHello.<|eos|>\n<|user|>\nBye\n<|assistant|>\nNo.<|eos|>\n"
    assert [len(border["before"]) for border in text["borders"]] == [4, 4, 4, 4]
    assert record["tokens"] == text["tokens"] and record["targets"] == len("Hello.No.") + 2


def test_colours_on_a_terminal(data: Path) -> None:
    survey = open_survey(data, model=None, tokenizer=None, seq_len=64)
    shown = Viewer(survey.tokenizer, seq_len=64, colour=True).to_text(list(survey.entries)[1])
    assert "<|bos|>2+2=\033[1;32mfour<|eos|>\033[0m" in shown and "[[" not in shown


def test_check_lists_every_bad_line_and_fails(capsys: CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    assert run(capsys, data, "--check") == (0, "3 records, 82 tokens, 20 targets; no bad line\n")
    bad = tmp_path / "bad" / "b.jsonl"
    bad.parent.mkdir()
    lines: list[Any] = [{"text": "x"}, {"prompt": "x"}, TALK, {"messages": [*TALK["messages"], {"role": "user"}]},
                        {**TALK, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    bad.write_text("\n".join(map(json.dumps, lines)) + "\n{")
    (bad.parent / "c.txt").write_bytes(b"fine\nb\xffd\nfine\n\xfe\n")
    status, out = run(capsys, bad.parent, "--check")
    assert status == 1
    found = [line.partition(". ")[0] for line in out.splitlines()[:-1]]
    assert found == [f'{bad}, line 2: "prompt" without "completion"', f'{bad}, line 4: message 5 has no "content"',
                     f'{bad}, line 5: the chat template leaves out what is said: "tools"',
                     f"{bad}, line 6: not valid JSON: Expecting property name enclosed in double quotes at column 2",
                     f"{bad.parent / 'c.txt'}, line 2: not UTF-8: byte 0xff at column 2",
                     f"{bad.parent / 'c.txt'}, line 4: not UTF-8: byte 0xfe at column 1"]
    assert out.splitlines()[-1].endswith("6 bad lines")
    status, out = run(capsys, bad.parent, "--check", "--json")
    assert status == 1 and [problem["line"] for problem in json.loads(out)["problems"]] == [2, 4, 5, 6, 2, 4]


def test_what_is_cut_and_what_is_rewritten_is_counted(capsys: CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    status, out = run(capsys, data, "--seq-len", 12, "--check")
    assert status == 0 and "1 text longer than a sequence of 12 tokens, so cut (1 of them with a prompt" in out
    assert "longer than a sequence of 12 tokens: it is cut" in run(capsys, data, "--seq-len", 12)[1]
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = REWRITING
    tokenizer.save_pretrained(tmp_path / "model")
    status, out = run(capsys, data, "--model", tmp_path / "model", "--line", 4)
    assert status == 0 and "in 2 texts, because the template rewrites what was said before" in out
    assert "[assistant][[!Hello.[end]" in out and "[assistant]Hello.[end]" in out and "[assistant][[!No.[end]" in out
    assert "1 conversation in several texts" in out


def test_the_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n" + "\n\n".join("word " * 500 for _ in range(4)))
    entries = list(open_survey(path, model=None, tokenizer=None, seq_len=8).entries)
    assert [entry.line for entry in entries] == [3, 5, 7, 9]
    assert [entry.line for entry in open_survey(path, model=None, tokenizer=None, seq_len=8, first_line=6).entries] == [7, 9]


def test_mistakes_are_refused(capsys: CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    for arguments, message in ((["--line", 9], "--line: there is no record from there on (given: 9)"),
                               (["--check", "--line", 2], "--check: goes through all lines"),
                               (["--model", "nope"], "--model: neither a directory nor a preset (given: nope)"),
                               (["--tokenizer", tmp_path], "--tokenizer: holds no tokenizer")):
        assert main(["data", str(data), *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "more.jsonl").write_text('{"text": "x"}\n')
    assert main(["data", str(tmp_path), "--line", "2"]) == 2
    assert "there are several files" in capsys.readouterr().err


def test_a_token_that_the_model_has_no_embedding_for_is_a_bad_line(capsys: CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["four"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 259}')
    assert len(Encoder(tokenizer).encode(list(open_survey(data, model=None, tokenizer=None, seq_len=8).entries)[1].record)) == 7
    status, out = run(capsys, data, "--model", tmp_path / "model", "--check")
    assert status == 1 and "line 2: the token 'four' has id 259, but the model's vocabulary ends at 258" in out
