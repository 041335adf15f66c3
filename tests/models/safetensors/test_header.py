"""A header is accepted exactly where the safetensors library accepts it, with the same tensors; a
key that stands twice is refused besides."""

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors

from ratel.errors import RatelError
from ratel.models.safetensors.files import TensorFiles, indexed_files
from ratel.models.safetensors.header import read_header

pytestmark = pytest.mark.unit
DATA = bytes(64)
NUMBERS = [-1, 0, 1, 4, 8, 16, 32, 48, 60, 64, 65, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**30,
           0.0, 4.0, 1e300, True, False, None, "4", [], {}, [[4]]]
SOUND = {"__metadata__": {"format": "pt"},
         "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
         "b": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]},
         "c": {"dtype": "U8", "shape": [2, 8], "data_offsets": [32, 48]},
         "none": {"dtype": "F64", "shape": [0], "data_offsets": [48, 48]},
         "d": {"dtype": "F64", "shape": [2], "data_offsets": [48, 64]}}


def write(path: Path, header: bytes, data: bytes = DATA, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception:
        return None


def ours(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        return {name: (entry.dtype_name, list(entry.shape)) for name, entry in read_header(path).tensors.items()}
    except RatelError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


def mutated(rng: random.Random) -> dict[str, Any]:
    header = copy.deepcopy(SOUND)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(header))
        entry = header[name]
        if name == "__metadata__" or not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            header[name] = rng.choice([*NUMBERS, {"x": 1}, {"x": "y"}, ["F32", [4], [0, 16]]])
            continue
        kind = rng.randrange(9)
        if kind == 0:
            entry["data_offsets"] = list(header[rng.choice("abcd")]["data_offsets"]) if rng.random() < 0.5 else rng.sample(
                [0, 8, 16, 24, 32, 48, 56, 64, 72], 2)
        elif kind == 1:
            entry["data_offsets"] = [rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 2, 2, 3]))]
        elif kind == 2:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
        elif kind == 3:
            entry["dtype"] = rng.choice(["F32", "F16", "BF16", "F8_E4M3", "F4", "F6_E2M3", "C64", "I64", "F33", "", 7, None])
        elif kind == 4:
            del entry[rng.choice(list(entry))]
        elif kind == 5:
            del header[name]
        elif kind == 6:
            entry["other"] = rng.choice(NUMBERS)
        elif kind == 7:
            header[rng.choice(["", "e", "\u00e9", "__metadata__ "])] = copy.deepcopy(entry)
        else:
            header[name] = [entry["dtype"], entry["shape"], entry["data_offsets"]][: rng.choice([2, 3, 3])]
        if not all(isinstance(header.get(key), dict) and "data_offsets" in header[key] for key in "abcd"):
            break
    return header


def test_mutated_headers_are_judged_as_the_library_judges_them(tmp_path: Path) -> None:
    rng, accepted = random.Random(7), 0
    for _ in range(3000):
        text = json.dumps(mutated(rng)).encode()
        data = rng.choice([DATA] * 6 + [DATA[:-1], DATA + b"\0", b""])
        length = rng.choice([None] * 20 + [0, 1, len(text) - 1, len(text) + 1, 100_000_001, 1 << 63])
        path = write(tmp_path / "t.safetensors", text, data, length)
        assert ours(path) == library(path), text
        accepted += ours(path) is not None
    assert 50 < accepted < 2000  # both answers were put to the test


def test_flipped_bytes_are_judged_as_the_library_judges_them(tmp_path: Path) -> None:
    rng, sound = random.Random(8), json.dumps(SOUND).encode()
    for _ in range(2000):
        text = bytearray(sound)
        for _ in range(rng.choice([1, 1, 2])):
            text[rng.randrange(len(text))] = rng.choice(b'0123456789{}[]",:-.eE \t\n\\u\x00\x7f\x80\xff')
        path = write(tmp_path / "t.safetensors", bytes(text))
        if _has_twice(bytes(text)):
            assert ours(path) is None
        else:
            assert ours(path) == library(path), bytes(text)


def _has_twice(text: bytes) -> bool:
    found = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) != len(pairs))
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=look)
    except ValueError:
        return False
    return any(found)


ONE = '{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
SPELLINGS = {"plain": f'{{"a":{ONE}}}', "spaces": f' \t\n{{"a":{ONE}}}\r  ', "nul": f'{{"a":{ONE}}}\0', "bom": f'\ufeff{{"a":{ONE}}}',
             "half": f'{{"\\ud800":{ONE}}}', "whole pair": f'{{"\\ud83d\\ude00":{ONE}}}', "control": f'{{"\x01":{ONE}}}',
             "deep": f'{{"a":{ONE[:-1]},"x":{"[" * 120}{"]" * 120}}}}}', "deeper": f'{{"a":{ONE[:-1]},"x":{"[" * 130}{"]" * 130}}}}}',
             "much deeper": f'{{"a":{ONE[:-1]},"x":{"[" * 100000}{"]" * 100000}}}}}', "long": f'{{"a":{ONE[:-1]},"x":{"9" * 5000}}}}}',
             "long float": f'{{"a":{ONE[:-1]},"x":{"9" * 100}}}}}', "out of range": f'{{"a":{ONE[:-1]},"x":1e999}}}}',
             "nan": f'{{"a":{ONE[:-1]},"x":NaN}}}}', "minus zero": f'{{"a":{ONE.replace("[0,", "[-0,")}}}', "list": "[]", "none": "",
             "null": "null", "empty": "{}", "no metadata": f'{{"__metadata__":null,"a":{ONE}}}'}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_json(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", text.encode("utf-8"))
    assert ours(path) == library(path)


@pytest.mark.parametrize("text", [f'{{"a":{ONE},"a":{ONE}}}', f'{{"a":{ONE[:-1]},"dtype":"F32"}}}}',
                                  f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ONE}}}'])
def test_what_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RatelError, match="twice"):
        read_header(write(tmp_path / "t.safetensors", text.encode()))


def test_overlaps_holes_and_ends_are_named(tmp_path: Path) -> None:
    for offsets, said in (([0, 16], "'b' begins at byte 0 of the data and ends at 16"), ([20, 36], "'b' begins at byte 20"),
                          ([-16, 0], "'b' has the data_offsets")):
        header = {**SOUND, "b": {**SOUND["b"], "data_offsets": offsets}}
        with pytest.raises(RatelError, match=said):
            read_header(write(tmp_path / "t.safetensors", json.dumps(header).encode()))
    with pytest.raises(RatelError, match="cut off"):
        read_header(write(tmp_path / "t.safetensors", json.dumps(SOUND).encode(), DATA[:-1]))
    with pytest.raises(RatelError, match="1 bytes follow the last tensor"):
        read_header(write(tmp_path / "t.safetensors", json.dumps(SOUND).encode(), DATA + b"x"))


@pytest.mark.parametrize("shape", [[1 << 32, 1 << 32, 0], [0, 1 << 32, 1 << 32], [1 << 63, 0], [1 << 62, 8, 0]])
def test_a_product_beyond_64_bits_is_no_size(shape: list[int], tmp_path: Path) -> None:
    header = {**SOUND, "none": {**SOUND["none"], "shape": shape}}
    path = write(tmp_path / "t.safetensors", json.dumps(header).encode())
    assert ours(path) == library(path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    text = json.dumps(SOUND).encode()
    paths = [write(tmp_path / name, text) for name in ("one.safetensors", "two.safetensors")]
    with pytest.raises(RatelError, match="a is in one.safetensors, too"):
        TensorFiles(paths)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}',
                                     '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "x/../../y"}}',
                                     '{"weight_map": {"a": "b"}, "weight_map": {}}', "[" * 100000, "\ufeff{}", "9" * 5000,
                                     '{"weight_map": {"a": "\\ud800"}}', '{"weight_map": {"a": "x\\u0000y"}}'])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, encoding="utf-8")
    with pytest.raises(RatelError, match="not an index of safetensors files") as caught:
        indexed_files(index, "model")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
