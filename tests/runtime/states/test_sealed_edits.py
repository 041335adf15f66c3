"""A state whose JSON was edited and sealed again is refused in one line: a seal shows damage, not
what may stand there."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from tests.support.families import batches, build

pytestmark = pytest.mark.e2e
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "state"
    with Session(build("llama"), device="cpu", micro_batch=2, tier="dram") as session:
        session.step(batches("llama", 1)[0])
        session.save(path, extra={"step": 1})
    return path


def sealed(content: dict[str, Any]) -> bytes:
    content.pop("seal", None)
    return json.dumps({**content, "seal": zlib.crc32(json.dumps(content).encode())}).encode()


def read_edited(state: Path, copy: Path, name: str, edit: Edit) -> SavedState:
    copy.mkdir()
    for entry in state.iterdir():
        (copy / entry.name).symlink_to(entry)
    head, newline, rest = (state / name).read_bytes().partition(b"\n")
    content = json.loads(head)
    edit(content)
    (copy / name).unlink()
    (copy / name).write_bytes(sealed(content) + newline + rest)
    return SavedState(copy)


def _plane(unit: int, name: str, **values: Any) -> Edit:
    return lambda m: m["planes"][unit][name].update(values)


MANIFEST: dict[str, Edit] = {
    "no grain": lambda m: m.pop("grain"), "grain 0": lambda m: m.update(grain=0), "grain text": lambda m: m.update(grain="x"),
    "grain true": lambda m: m.update(grain=True), "grain huge": lambda m: m.update(grain=1 << 62),
    "no version": lambda m: m.pop("version"), "version list": lambda m: m.update(version=[2]), "version to come": lambda m: m.update(version=99),
    "slots 0": lambda m: m.update(num_slots=0), "slot_bytes": lambda m: m.update(slot_bytes=1), "files": lambda m: m.update(files=[]),
    "files number": lambda m: m.update(files=[7]), "files nul": lambda m: m.update(files=["a\0b"]),
    "files twice": lambda m: m.update(files="planes.0"), "pattern": lambda m: m.update(pattern=[5]),
    "pattern empty": lambda m: m.update(pattern=[]), "pattern negative": lambda m: m.update(pattern=[-1]),
    "stripe 0": lambda m: m.update(stripe_bytes=0), "stripe nan": lambda m: m.update(stripe_bytes=float("nan")),
    "planes": lambda m: m.update(planes={}), "planes short": lambda m: m["planes"].pop(), "plane kind": lambda m: m["planes"][0].update(x={}),
    "plane gone": lambda m: m["planes"][0].pop("m"), "offset": _plane(0, "hi", offset=-4096), "offset far": _plane(0, "hi", offset=1 << 62),
    "offset float": _plane(0, "hi", offset=0.0), "elements": _plane(0, "v", num_elements=2048), "more": _plane(0, "hi", num_elements=1 << 40),
    "model": lambda m: m.update(model=None), "units": lambda m: m["model"].update(units=[1]), "name": lambda m: m["model"].pop("name"),
    "unit name": lambda m: m["model"]["units"][0].update(name=None), "trained": lambda m: m["model"]["units"][0].update(num_trainable=-1),
    "trained more": lambda m: m["model"]["units"][0].update(num_trainable=1 << 40),
    "params": lambda m: m["model"]["units"][0].update(params=[[]]), "param": lambda m: m["model"]["units"][0]["params"][0].pop("shape"),
    "checksum": lambda m: m.update(checksum="md5")}
RECORD: dict[str, Edit] = {
    "sequence": lambda r: r.update(sequence="1"), "no slots": lambda r: r.pop("slots"), "slots": lambda r: r.update(slots=[0]),
    "slot": lambda r: r["slots"].__setitem__(0, 9), "slot negative": lambda r: r["slots"].__setitem__(0, -1),
    "training": lambda r: r.update(training=[]), "seed": lambda r: r["training"].pop("seed"), "steps": lambda r: r["training"].update(steps=-1),
    "updates": lambda r: r["training"].update(updates=1e300), "dtype": lambda r: r["training"].update(dtype="int8"),
    "extra": lambda r: r["training"].update(extra=None), "rows": lambda r: r["training"].update(micro_batches={"rows": 0}),
    "count": lambda r: r.update(num_checksums=1 << 70), "count less": lambda r: r.update(num_checksums=0, checksums_crc32=0),
    "crc": lambda r: r.update(checksums_crc32=None)}
CASES = [("manifest.json", name, edit) for name, edit in MANIFEST.items()] + [("commit-0", name, edit) for name, edit in RECORD.items()]


@pytest.mark.parametrize("file,edit", [(file, edit) for file, _, edit in CASES], ids=[f"{f} {n}" for f, n, _ in CASES])
def test_an_edited_and_sealed_state_is_refused_in_one_line(file: str, edit: Edit, state: Path, tmp_path: Path) -> None:
    with pytest.raises(RatelError) as caught:
        read_edited(state, tmp_path / "copy", file, edit)
    words = str(caught.value)
    assert "\n" not in words and len(words) < 700 and str(tmp_path) in words and caught.value.remedy


def test_edited_within_what_it_may_be_it_is_read(state: Path, tmp_path: Path) -> None:
    read = read_edited(state, tmp_path / "copy", "commit-0", lambda r: r["training"]["extra"].update(more=[1]))
    assert read.training["extra"] == {"step": 1, "more": [1]}
    assert read.verify() == read.num_bytes


@pytest.mark.parametrize("content", [b"[" * 200000, b'{"a":' * 100000, b"9" * 5000, b'{"a": NaN}', b"\xef\xbb\xbf{}", b"\xff", b"",
                                     b'{"a": 1, "a": 1}', b'{"format": "\\ud800"}'])
def test_json_of_any_kind_is_refused_in_one_line(content: bytes, state: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "commit-0"):
        copy = tmp_path / name
        copy.mkdir()
        for entry in state.iterdir():
            (copy / entry.name).symlink_to(entry)
        (copy / name).unlink()
        (copy / name).write_bytes(content)
        with pytest.raises(RatelError, match="damaged|neither of its commit records|not a state") as caught:
            SavedState(copy)
        assert "\n" not in str(caught.value)
