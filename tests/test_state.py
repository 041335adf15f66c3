"""A saved state continues the run bit for bit, anywhere; a damaged one is refused with its place."""

import json
import zlib
from pathlib import Path

import pytest
import torch

from families_common import batches, build, loss_fn_of
from ratel.errors import RatelError
from ratel.runtime import state
from ratel.runtime.session import Session

pytestmark = pytest.mark.e2e
STEPS = 6


def open_session(family: str, ssd_dir: Path, **options) -> Session:
    defaults = dict(device="cpu", ssd=[ssd_dir], lr=1e-3, weight_decay=0.1, tier="ssd", micro_batch=2, max_grad_norm=0.5)
    return Session(build(family), loss_fn=loss_fn_of(family), **{**defaults, **options})


def everything(session: Session) -> dict[str, torch.Tensor]:
    result = session.state_dict()
    for unit in session.plan.spec.units:
        result |= {f"{unit.name}.{plane}": session.read_state(unit, plane) for plane in ("m", "v")}
    return result


def uninterrupted(family: str, ssd: Path, **options) -> dict[str, torch.Tensor]:
    with open_session(family, ssd, **options) as session:
        for batch in batches(family, STEPS):
            session.step(batch)
        return everything(session)


def saved_after(steps: int, family: str, ssd: Path, path: Path, **options) -> Path:
    with open_session(family, ssd, **options) as session:
        for batch in batches(family, STEPS)[:steps]:
            session.step(batch)
        return session.save(path, extra={"cursor": 17})


ELSEWHERE = [dict(tier="ssd"), dict(tier="dram"), dict(tier="gpu"), dict(tier="dram", optimizer_threads=3),
             dict(placement={"*": "dram", "block.1": "gpu", "block.2": "ssd"})]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "patches"])
def test_resuming_anywhere_equals_going_on(family: str, ssd_dir: Path, tmp_path: Path) -> None:
    expected = uninterrupted(family, ssd_dir)
    path = saved_after(3, family, ssd_dir, tmp_path / "state")
    for options in ELSEWHERE:
        with open_session(family, ssd_dir, **options) as session:
            assert session.load(path) == {"cursor": 17}
            outs = [session.step(batch) for batch in batches(family, STEPS)[3:]]
            assert [out.step for out in outs] == [4, 5, 6]
            found = everything(session)
        assert all(torch.equal(found[name], expected[name]) for name in expected), options


def test_other_number_of_directories(ssd_dir: Path, tmp_path: Path) -> None:
    expected = uninterrupted("llama", ssd_dir)
    path = saved_after(2, "llama", ssd_dir, tmp_path / "state", tier="dram")
    with open_session("llama", ssd_dir, ssd=[ssd_dir / "a", ssd_dir / "b", ssd_dir / "c"]) as session:
        session.load(path)
        for batch in batches("llama", STEPS)[2:]:
            session.step(batch)
        found = everything(session)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_flipped_bit_is_found(ssd_dir: Path, tmp_path: Path) -> None:
    path = saved_after(1, "llama", ssd_dir, tmp_path / "state")
    files = sorted(path.glob("unit-*.bin"))
    manifest = json.loads((path / "manifest.json").read_text())
    for file, entry in zip(files, manifest["units"], strict=True):
        for plane, place in entry["planes"].items():
            flip(file, place["offset"] + place["num_bytes"] // 2)
            with pytest.raises(RatelError, match=f"plane {plane}, chunk 0") as caught:
                state.SavedState(path).verify()
            assert str(file) in str(caught.value)
            flip(file, place["offset"] + place["num_bytes"] // 2)
    assert state.SavedState(path).verify() == sum(p["num_bytes"] for e in manifest["units"] for p in e["planes"].values())


def flip(file: Path, position: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ 0x10]))


def test_refusals(ssd_dir: Path, tmp_path: Path) -> None:
    path = saved_after(1, "llama", ssd_dir, tmp_path / "state")

    def refused(match: str, family: str = "llama", **options) -> None:
        with open_session(family, ssd_dir, **options) as session, pytest.raises(RatelError, match=match):
            session.load(path)
            session.step(batches(family, 1)[0])

    refused("seed 0", seed=1)
    refused("unit|units", family="qwen3")
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"steps": 1', '"steps": 2'))
    refused("seal")
    newer = {**json.loads(text), "version": 99}
    (path / "manifest.json").write_text(json.dumps(newer))
    refused("format 99")
    (path / "manifest.json").write_text(text[: len(text) // 2])
    refused("damaged")
    (path / "manifest.json").unlink()
    refused("not a complete state")
    (path / "manifest.json").write_text(text)
    last = sorted(path.glob("unit-*.bin"))[-1]
    last.write_bytes(last.read_bytes()[:4096])
    refused("cut short")


def test_a_failed_save_leaves_the_older_state(ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session("llama", ssd_dir) as session:
        session.step(batches("llama", 1)[0])
        path = session.save(tmp_path / "state")
        before = (path / "manifest.json").read_text()
        session.step(batches("llama", 1)[0])
        with monkeypatch.context() as patch:
            patch.setattr(state.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(RatelError, match="No space left"):
                session.save(path)
        assert (path / "manifest.json").read_text() == before and state.SavedState(path).verify() > 0
        session.save(path)
        assert state.SavedState(path).training["steps"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_reader_of_its_own(ssd_dir: Path, tmp_path: Path) -> None:
    """Written from docs/state_format.md alone: numpy and json, none of our code."""
    import numpy as np

    with open_session("llama", ssd_dir) as session:
        session.step(batches("llama", 1)[0])
        path = session.save(tmp_path / "state")
        expected = session.state_dict()
    manifest = json.loads((path / "manifest.json").read_text())
    found = {}
    for shape, entry in zip(manifest["model"]["units"], manifest["units"], strict=True):
        raw = (path / entry["file"]).read_bytes()
        planes = {}
        for name, place in entry["planes"].items():
            data = raw[place["offset"] : place["offset"] + place["num_bytes"]]
            step = manifest["chunk_bytes"]
            assert [zlib.crc32(data[i : i + step]) for i in range(0, len(data), step)] == place["crc32"]
            planes[name] = np.frombuffer(data, {"hi": "<u2", "lo": "<i2", "m": "<f4", "v": "<f4"}[name])
        bits = (planes["hi"].astype(np.int64) << 16) + planes["lo"]
        master = (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        for param in shape["params"]:
            count = int(np.prod(param["shape"]))
            found[param["name"]] = master[param["offset"] : param["offset"] + count].reshape(param["shape"])
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values, expected[name].numpy()), name
