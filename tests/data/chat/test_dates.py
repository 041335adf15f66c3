"""A chat template that writes the date writes that of the run's first day, also when the run is
resumed on another."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.data import dataset as datasets
from ratel.data import load_tokenizer, open_dataset
from ratel.data.dataset import day_of
from ratel.errors import RatelError

pytestmark = pytest.mark.unit
DATED = ("{{ bos_token }}Today is {{ strftime_now('%d %B %Y') }}\n{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
         "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def talks(tmp_path: Path) -> Path:
    lines = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]} for i in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "talks.jsonl"


def opened(path: Path, **options: Any) -> datasets.Dataset:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = options.pop("template", DATED)
    return open_dataset(str(path), tokenizer, seq_len=64, batch_size=2, seed=0, **options)


def test_a_position_knows_the_day_of_its_run(tmp_path: Path) -> None:
    path = talks(tmp_path)
    with opened(path, today=date(2026, 1, 2)) as dataset:
        batches = dataset.batches()
        next(batches)
        position = json.loads(json.dumps(dataset.state_dict()))
        expected = next(batches)
    assert "Today is 02 January 2026" in load_tokenizer().decode(expected["input_ids"][0])
    assert day_of(position) == date(2026, 1, 2)
    with opened(path, today=day_of(position)) as dataset:  # as `--resume` opens it, whatever the day is
        dataset.load_state_dict(position)
        assert torch.equal(next(dataset.batches())["input_ids"], expected["input_ids"])
    with opened(path) as dataset:
        dataset.load_state_dict(position)
        found = next(dataset.batches())["input_ids"]
    assert not torch.equal(found, expected["input_ids"]) and day_of(dataset.state_dict()) == date.today()


def test_without_a_date_there_is_none_in_the_position(tmp_path: Path) -> None:
    with opened(talks(tmp_path), template=DATED.replace("strftime_now('%d %B %Y')", "'a day'")) as dataset:
        assert day_of(dataset.state_dict()) is None and "today" not in dataset.state_dict()["data"]


@pytest.mark.parametrize("day", [7, "yesterday", None, ["2026-01-02"]])
def test_a_day_that_is_none_is_refused(day: Any) -> None:
    with pytest.raises(RatelError, match="no date"):
        day_of({"data": {"today": day}})
    assert day_of(None) is None and day_of({"batches": 3}) is None
