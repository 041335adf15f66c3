"""The door for files: what is no regular file is refused at once, JSON says one thing, and a schema
names what is wrong."""

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ratel.config import read_file
from ratel.data.sources.files import find_sources
from ratel.data.tokens.tokenizer import load_tokenizer
from ratel.errors import RatelError
from ratel.models.checkpoints.config import read_config
from ratel.models.checkpoints.directory import model_files
from ratel.models.safetensors.header import read_header
from ratel.planner.machine.hardware import Hardware, load_hardware
from ratel.reading import JsonError, NotRegularError, open_regular, parse_json, read_regular, refuse_odd_entries
from ratel.schema import SchemaError, check, listing, mapping, nullable, number, one_of, record, text, whole
from ratel.startup import readahead
from ratel.training.options import read_earlier
from ratel.training.resume import cut_metrics

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def make(kind: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's name has 108 bytes at most
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
        os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


KINDS = ("pipe", "socket", "device", "directory")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "x")
    with pytest.raises(NotRegularError) as caught:
        open_regular(path)
    assert kind in caught.value.strerror and caught.value.filename == str(path)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_reader_refuses_it(kind: str, tmp_path: Path) -> None:
    readers = {"config.toml": read_file, "d.jsonl": find_sources, "t.safetensors": read_header, "hw.json": lambda path: load_hardware(str(path)),
               "out/config.json": lambda path: read_earlier(path.parent), "model/config.json": lambda path: read_config(path.parent),
               "tokenizer/tokenizer.json": lambda path: load_tokenizer(str(path.parent)),
               "index/model.safetensors.index.json": lambda path: model_files(path.parent)}
    for name, read in readers.items():
        with pytest.raises(RatelError) as caught:
            read(make(kind, tmp_path / name))
        assert "\n" not in str(caught.value) and caught.value.remedy, name
    assert readahead.weight_files(str(tmp_path / "index")) == []


def test_data_from_standard_input_says_what_to_do() -> None:
    with pytest.raises(RatelError, match="Write what comes out of it to a .txt or .jsonl file"):
        find_sources("/dev/null")


def test_odd_entries_of_a_directory_are_found_below_it_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "below").mkdir()
    refuse_odd_entries(tmp_path)
    make("pipe", tmp_path / "below" / "pipe")
    with pytest.raises(NotRegularError, match="named pipe"):
        refuse_odd_entries(tmp_path)


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1,000,000 bytes"):
        read_regular(tmp_path / "sparse", 1_000_000)


@pytest.mark.parametrize("content,said", [
    ("[" * 200000, "nested too deeply"), ('{"a":' * 200000, "nested too deeply"), ("9" * 5000, "too many digits"), ('{"a": 1, "a": 2}', "'a' stands twice"),
    (b"\xef\xbb\xbf{}", "byte-order mark"), ('"\\ud800"', "half of a surrogate"), ("NaN", "NaN is no number"), ("[-Infinity]", "no number"), ("{", "line 1, column 2"),
    (b"\xff", "not UTF-8"), ("{}".encode("utf-16"), "not UTF-8"), ("", "not JSON")])
def test_json_says_one_thing(content: str | bytes, said: str) -> None:
    with pytest.raises(JsonError, match=said) as caught:
        parse_json(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opening,closing", [("[", "]"), ('{"a":', "}"), ('[1, {"a":', "}]")])
def test_depth_has_one_limit_whatever_pythons_is(opening: str, closing: str) -> None:
    """What its parser takes just so is too deep for the next that goes through it."""
    levels = opening.count("[") + opening.count("{")
    parse_json(opening * (100 // levels) + "0" + closing * (100 // levels))
    for depth in (101, 150, 300):
        with pytest.raises(JsonError, match="nested too deeply"):
            parse_json(opening * depth + "0" + closing * depth)


def test_plain_json_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, "\\u00e9 \\ud83d\\ude00", null]}') == {"a": [1, 2.5, "\u00e9 \U0001f600", None]}
    assert parse_json("[Infinity]", allow_infinity=True) == [float("inf")]


SHAPE = record({"count": whole(1, 10), "rate": number(0, above=True)}, {"names": listing(text("[a-z]+", "a name"), most=2), "kind": one_of("x", 1),
                                                                        "more": mapping(text(), nullable(whole()))})


@pytest.mark.parametrize("change,said", [
    ({"count": True}, "count must be a whole number, not True"), ({"count": 11}, "count must be a whole number from 1 to 10, not 11"),
    ({"count": 2.0}, "not 2.0"), ({"count": 10**5000}, "huge int"), ({"rate": 0}, "above 0"), ({"rate": float("nan")}, "must be a number, not nan"),
    ({"rate": 10**400}, "must be a number"), ({"names": "ab"}, "names must be a list"), ({"names": ["a", "B"]}, r"names\[1\] must be a name, not 'B'"),
    ({"names": ["a"] * 3}, "has 3 entries"), ({"kind": True}, "kind must be 'x' or 1, not True"), ({"more": {"a": -1}}, "more.a must be"), ({"other": 1}, "other is not known")])
def test_a_schema_names_place_and_value(change: dict[str, Any], said: str) -> None:
    sound = {"count": 1, "rate": 0.5, "names": ["a"], "kind": 1, "more": {"a": None}}
    assert check(sound, SHAPE) == sound
    with pytest.raises(SchemaError, match=said):
        check({**sound, **change}, SHAPE)
    with pytest.raises(SchemaError, match="rate is missing"):
        check({"count": 1}, SHAPE)


@pytest.mark.parametrize("change", [{"cores": 0}, {"cores": True}, {"gpu_bytes": -1}, {"gpu_bytes": "1"}, {"h2d_bps": 1e300}, {"h2d_bps": float("nan")}, {"name": 7},
                                    {"ssds": 5}, {"ssds": [5]}, {"stripes": ["a"]}, {"stripes": [0]}, {"ssd_limit_bps": []}, {"adam_elsewhere": None}])
def test_hardware_of_other_types_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RatelError, match="hardware"):
        Hardware.from_json({**load_hardware("4090").to_json(), **change})


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"hidden_size": 1 << 60}, {"text_config": {"n_layer": 5000}}, {"x": [1, -(1 << 60)]}, {"model_type": "../x"},
                                    {"model_type": 5}])
def test_a_configuration_with_numbers_of_no_model_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **change}))
    with pytest.raises(RatelError, match="out of range|name of a kind of model"):
        read_config(tmp_path)


def test_lines_of_metrics_that_are_none_stay_and_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"loss": 1.0, "grad_norm": None, "tokens": 1, "step_s": 1.0, "bound_s": 0.5, "bound_by": "ssd", "skipped": False}
    lines = [json.dumps({"step": step, **line}) for step in range(1, 6)]
    bad = ["[" * 5000, '{"step": 2}', '{"step": "3"}', '{"step": 1e999}']
    path.write_text("\n".join([lines[0], *bad, lines[1], lines[2], lines[3], lines[4]]) + "\n")
    assert [found["step"] for found in cut_metrics(path, 3)] == [1, 2, 3]
    assert path.read_text().splitlines() == [lines[0], *bad, lines[1], lines[2]]


def test_a_damaged_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import importlib

    cache = importlib.import_module("ratel.probe_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = {"a": 1}
    cache.store(key, {"x": [1, 2]})
    assert cache.load(key, lambda found: found["x"]) == [1, 2]
    file = cache.cache_file(key)
    whole_file = file.read_text()
    for content in (whole_file.replace("2", "3"), "[" * 100000, "null", "{}", whole_file[:-5], ""):
        file.write_text(content)
        with caplog.at_level(logging.WARNING):
            assert cache.load(key, lambda found: found["x"]) is None
    file.write_text(whole_file)
    assert cache.load(key, lambda found: found["y"]["z"]) is None
