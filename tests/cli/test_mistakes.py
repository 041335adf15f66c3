"""Mistakes of people who use it for the first time: what they are told, in one line."""

from pathlib import Path

import pytest

from ratel.cli import main
from ratel.config import resolve
from ratel.data.sources.records import RecordError, parse_line
from ratel.errors import RatelError
from ratel.models.presets import preset_config

pytestmark = pytest.mark.unit


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("ratel: ") and said.count("\n") == 1
    return said[len("ratel: "):].strip()


@pytest.mark.parametrize("typed, said", [
    ("trian", "is not a command (given: trian). Did you mean train? See `ratel --help`"),
    ("help", "is not a command (given: help). See `ratel --help`"),
    ("train base", "stands where an option should (given: base). Values follow their options, as --model DIR --data FILE"),
    ("train --model base --quiet yes", "stands where an option should (given: yes)"),
    ("train --model", "--model: needs a value. Write --model DIR|PRESET"),
    ("train --model base --compile --steps 3", "--compile: needs a value. Write --compile off|on"),
    ("train --model base --lr -1e-4", "--lr: must be above 0 (given: -0.0001)"),
    ("train --model base --gpu-memory -1GiB", "--gpu-memory: not a size (given: '-1GiB'). Write it like 24GiB"),
    ("train --model base --learning-rate 1e-4", "--learning-rate: is not an option here. Did you mean --lr?"),
    ("train --model base --epochs 3", "--epochs: is not an option here. Did you mean --steps?"),
    ("train --model base --bs 4", "--bs: is not an option here. Did you mean --batch-size?"),
    ("train --model base --fp16", "--fp16: is not an option here. Did you mean --dtype?"),
    ("train --model_name_or_path base", "--model_name_or_path: is not an option here. Did you mean --model?"),
    ("train --model base --output_dir o", "--output_dir: is not an option here. Did you mean --out?"),
    ("train --model base --gpu-memory 24", "--gpu-memory: is 24 bytes (given: 24). Write the unit: 24GiB"),
    ("train --model base --keep 3 --durable step", "Use --keep 1, or --durable checkpoint to keep more")])
def test_what_is_typed(typed: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in told(capsys, *typed.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("toml, said", [
    ('[train]\nmodel = "base"\n', "[train]: is a table in"), ("model = base\n", "with texts in quotes"),
    ('model = "base"\nlearning_rate = 1e-4\n', "learning_rate: is not an option in x.toml. Did you mean lr?"),
    ('model = "base"\ngpu_memory = 24\n', "--gpu-memory: is 24 bytes (given: 24). Write the unit: 24GiB")])
def test_a_file_of_options(toml: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(toml)
    assert said in told(capsys, "train", "--config", "x.toml")


def test_a_budget_in_bytes_that_a_program_computed() -> None:
    assert resolve({"dram": 3000}).dram == 3000


@pytest.mark.parametrize("line, said", [
    ('{"instruction": "a", "input": "", "output": "b"}', '"prompt": instruction and input, "completion": output'),
    ('{"conversations": [{"from": "human", "value": "x"}]}', 'Call them "messages"'), ('{"question": "a", "answer": "b"}', 'Call them "prompt" and "completion"'),
    ('{"prompt": "a", "response": "b"}', '"prompt" without "completion"'), ('{"content": "a"}', 'Call it "text"')])
def test_lines_as_other_programs_have_them(line: str, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_line(line.encode())
    assert said in f"{caught.value}. {caught.value.expected}"


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "llama-8", "model.gguf"])
def test_names_of_models_elsewhere(name: str) -> None:
    with pytest.raises(RatelError, match="nothing is downloaded"):
        preset_config(name)


@pytest.mark.parametrize("data, said", [("wikitext", "nothing is downloaded"), ("x.json", 'one JSON object on a line, as {"text": ...}')])
def test_names_of_data(data: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.data.sources.files import find_sources

    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("[]")
    with pytest.raises(RatelError) as caught:
        find_sources(data)
    assert said in str(caught.value)


@pytest.mark.parametrize("options, said", [
    ({"config": {"lr": 1}}, "config: is not the path of a TOML file (given: dict). Give options themselves as keyword arguments"),
    ({"tokenizer": 3}, "tokenizer: is no tokenizer (given: int)"), ({"eval_data": 3}, "eval_data: is neither a path nor an iterable of batches (given: int)")])
def test_objects_of_other_kinds(options: dict, said: str, tmp_path: Path) -> None:
    import ratel

    with pytest.raises(RatelError) as caught:
        ratel.train("demo", out=tmp_path / "out", steps=1, batch_size=2, seq_len=16, device="cpu", dtype="fp32", dram="4GiB", quiet=True, **options)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
