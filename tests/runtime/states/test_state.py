"""A saved state continues the run bit for bit, anywhere; a damaged one is refused with its
place."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from ratel.runtime.states import durable_files
from ratel.runtime.states.saved_state import SavedState
from ratel.store.encodings import to_fp32
from tests.support.families import batches
from tests.support.sessions import flip, open_session

pytestmark = pytest.mark.e2e
STEPS = 6


def open_on_ssd(family: str, ssd_dir: Path, **options) -> Session:
    defaults = {"weight_decay": 0.1, "tier": "ssd", "max_grad_norm": 0.5}
    return open_session(options.pop("ssd", ssd_dir), family, **{**defaults, **options})


def everything(session: Session) -> dict[str, torch.Tensor]:
    result = session.state_dict()
    for unit in session.plan.spec.units:
        result |= {f"{unit.name}.{plane}": session.read_state(unit, plane) for plane in ("m", "v")}
    return result


def uninterrupted(family: str, ssd: Path, **options) -> dict[str, torch.Tensor]:
    with open_on_ssd(family, ssd, **options) as session:
        for batch in batches(family, STEPS):
            session.step(batch)
        return everything(session)


def saved_after(steps: int, family: str, ssd: Path, path: Path, **options) -> Path:
    with open_on_ssd(family, ssd, **options) as session:
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
        with open_on_ssd(family, ssd_dir, **options) as session:
            assert session.load(path) == {"cursor": 17}
            outs = [session.step(batch) for batch in batches(family, STEPS)[3:]]
            assert [out.step for out in outs] == [4, 5, 6]
            found = everything(session)
        assert all(torch.equal(found[name], expected[name]) for name in expected), options


def test_a_resumed_run_keeps_its_micro_batches(ssd_dir: Path, tmp_path: Path) -> None:
    """Others are tried and may be faster, or fit better; but sums would be rounded in another
    order."""
    state = saved_after(2, "llama", ssd_dir, tmp_path / "s", micro_batch=1)
    with open_on_ssd("llama", ssd_dir, micro_batch="auto") as session:
        session.load(state)
        for batch in batches("llama", STEPS)[2:]:
            session.step(batch)
        assert session.plan.work.micro_rows == 1
        found = everything(session)
    expected = uninterrupted("llama", ssd_dir, micro_batch=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_number_of_directories(ssd_dir: Path, tmp_path: Path) -> None:
    expected = uninterrupted("llama", ssd_dir)
    path = saved_after(2, "llama", ssd_dir, tmp_path / "state", tier="dram")
    with open_on_ssd("llama", ssd_dir, ssd=[ssd_dir / "a", ssd_dir / "b", ssd_dir / "c"]) as session:
        session.load(path)
        for batch in batches("llama", STEPS)[2:]:
            session.step(batch)
        found = everything(session)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_flipped_bit_is_found(ssd_dir: Path, tmp_path: Path) -> None:
    path = saved_after(1, "llama", ssd_dir, tmp_path / "state")
    saved = SavedState(path)
    for unit, plane in saved.planes():
        place = saved.manifest["planes"][unit][plane]
        position = place["offset"] + place["num_elements"] - 1
        flip(path / "planes.0", position)
        name = saved.manifest["model"]["units"][unit]["name"]
        with pytest.raises(RatelError, match=f"unit {name}, plane {plane}, chunk 0") as caught:
            SavedState(path).verify()
        assert str(path / "planes.0") in str(caught.value)
        flip(path / "planes.0", position)
    assert saved.verify() == saved.num_bytes > 0


def test_refusals(ssd_dir: Path, tmp_path: Path) -> None:
    path = saved_after(1, "llama", ssd_dir, tmp_path / "state")

    def refused(match: str, family: str = "llama", **options) -> None:
        with open_on_ssd(family, ssd_dir, **options) as session, pytest.raises(RatelError, match=match):
            session.load(path)
            session.step(batches(family, 1)[0])

    refused("seed 0", seed=1)
    refused("unit|units", family="qwen3")
    manifest, record = (path / "manifest.json").read_text(), (path / "commit-0").read_bytes()

    def refused_with(match: str, name: str, content: bytes) -> None:
        before = (path / name).read_bytes()
        (path / name).write_bytes(content)
        refused(match)
        (path / name).write_bytes(before)

    refused_with("neither of its commit records", "commit-0", record.replace(b'"steps": 1', b'"steps": 2'))
    refused_with("neither of its commit records", "commit-0", record[:-1])
    refused_with("neither of its commit records", "commit-0", record[:100])
    refused_with("neither of its commit records", "commit-0", record[:-1] + bytes([record[-1] ^ 1]))
    refused_with("seal", "manifest.json", manifest.replace('"index": 0', '"index": 7').encode())
    refused_with("format 99", "manifest.json", json.dumps({**json.loads(manifest), "version": 99}).encode())
    refused_with("damaged", "manifest.json", manifest[: len(manifest) // 2].encode())
    refused_with("cut short", "planes.0", (path / "planes.0").read_bytes()[:4096])
    (path / "manifest.json").unlink()
    refused("its manifest cannot be read")


def test_a_failed_save_leaves_the_older_state(ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on_ssd("llama", ssd_dir) as session:
        session.step(batches("llama", 1)[0])
        path = session.save(tmp_path / "state")
        before = (path / "commit-0").read_bytes()
        session.step(batches("llama", 1)[0])
        with monkeypatch.context() as patch:
            patch.setattr(durable_files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(RatelError, match="No space left"):
                session.save(path)
        assert (path / "commit-0").read_bytes() == before and SavedState(path).verify() > 0
        session.save(path)
        assert SavedState(path).training["steps"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_what_others_put_into_the_directory_stays(ssd_dir: Path, tmp_path: Path) -> None:
    with open_on_ssd("patches", ssd_dir) as session:
        session.step(batches("patches", 1)[0])
        session.save(tmp_path / "states" / "first")
        (tmp_path / "states" / "commit-1").write_text('{"sequence": 9, "of": "an older state"}')
        for _ in range(2):
            session.save(tmp_path / "states")
            assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["commit-0", "first", "manifest.json", "planes.0"]
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RatelError, match="save: is a file"):
            session.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    commits = tmp_path / "commits"
    (commits / "notes").mkdir(parents=True)
    with open_on_ssd("patches", ssd_dir, durable="step", commits=commits) as session:
        session.step(batches("patches", 1)[0])
        session.commit(wait=True)
    assert sorted(p.name for p in commits.iterdir()) == ["commit-1", "manifest.json", "notes"]
    for path in (tmp_path / "states", tmp_path / "states" / "first", commits):
        with open_on_ssd("patches", ssd_dir) as session:
            session.load(path)
            assert session.step(batches("patches", 1)[0]).step == 2


@pytest.mark.parametrize("states", ["exact", "bf16", "8bit"])
@pytest.mark.parametrize("kind", ["a copy", "commits on three directories"])
def test_a_reader_of_its_own(kind: str, states: str, ssd_dir: Path, tmp_path: Path) -> None:
    in_place = dict(ssd=[ssd_dir / name for name in "abc"], durable="step", commits=tmp_path / "state")
    with open_on_ssd("llama", ssd_dir, states=states, **({} if kind == "a copy" else in_place)) as session:
        for batch in batches("llama", 3):
            session.step(batch)
            if session.plan.commits:
                session.commit()
        if kind == "a copy":
            session.save(tmp_path / "state")
        session.wait_saved()
        expected = session.state_dict() | {
            f"{unit.name}.{plane}": to_fp32(session.read_state(unit, plane), session.plan.formats.encoding(plane))
            for unit in session.plan.spec.units for plane in "mv"}
    found = read_by_the_page(tmp_path / "state")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values, expected[name].numpy()), name


WEIGHT_KINDS = {"hi": np.dtype("<u2"), "lo": np.dtype("<i2")}
MOMENT_KINDS = {"exact": dict.fromkeys("mv", np.dtype("<f4")), "bf16": dict.fromkeys("mv", np.dtype("<u2")),
                "8bit": {plane: np.dtype([("codes", code, 128), ("step", "<f4")]) for plane, code in (("m", "i1"), ("v", "u1"))}}


def moment(plane: str, stored: np.ndarray) -> np.ndarray:
    if stored.dtype.fields is not None:
        values = (stored["codes"].astype(np.float32) * stored["step"][:, None]).ravel()
        return values * values if plane == "v" else values
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored


def read_by_the_page(path: Path) -> dict[str, np.ndarray]:
    """All masters, and the moments by unit, written from docs/state_format.md alone: numpy, json
    and zlib, none of our code."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    record = max((whole for name in ("commit-0", "commit-1") if (path / name).exists()
                  and (whole := unpacked((path / name).read_bytes()))), key=lambda pair: pair[0]["sequence"])
    head, sums = record
    sums = list(sums)
    volume = joined([(path / name).read_bytes() for name in manifest["files"]], manifest)
    masters = {}
    for unit, places, slot in zip(manifest["model"]["units"], manifest["planes"], head["slots"], strict=True):
        planes = {}
        for name, place in places.items():
            kind = {**WEIGHT_KINDS, **MOMENT_KINDS[manifest.get("formats", "exact")]}[name]
            each = 1 if kind.fields is None else 128
            begin, count, grain = slot * manifest["slot_bytes"] + place["offset"], place["num_elements"] // each, manifest["grain"] // each
            planes[name] = np.frombuffer(volume[begin : begin + count * kind.itemsize], kind)
            split = min(unit["num_trainable"], place["num_elements"]) // each
            for part in (planes[name][:split], planes[name][split:]):
                for at in range(0, len(part), grain):
                    assert zlib.crc32(part[at : at + grain].tobytes()) == sums.pop(0)
            if name in ("m", "v"):
                masters[f"{unit['name']}.{name}"] = moment(name, planes[name])
        bits = planes["hi"].astype(np.int64) << 16
        if "lo" in planes:
            bits[: len(planes["lo"])] += planes["lo"]
        master = (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        for param in unit["params"]:
            count = int(np.prod(param["shape"]))
            masters[param["name"]] = master[param["offset"] : param["offset"] + count].reshape(param["shape"])
    assert sums == []
    return masters


def unpacked(record: bytes) -> tuple[dict, np.ndarray] | None:
    line, _, rest = record.partition(b"\n")
    head = json.loads(line)
    seal = head.pop("seal")
    sums = rest[: 4 * head["num_checksums"]]
    if zlib.crc32(json.dumps(head).encode()) != seal or zlib.crc32(sums) != head["checksums_crc32"]:
        return None
    return head, np.frombuffer(sums, "<u4")


def joined(files: list[bytes], manifest: dict) -> bytes:
    """The volume whose stripes were dealt to the files."""
    stripe, taken, stripes = manifest["stripe_bytes"], [0] * len(files), []
    while any(at < len(file) for at, file in zip(taken, files)):
        for index in manifest["pattern"]:
            stripes.append(files[index][taken[index] : taken[index] + stripe])
            taken[index] += stripe
    return b"".join(stripes)
