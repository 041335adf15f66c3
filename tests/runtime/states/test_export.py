"""What is exported is what was trained, and transformers loads it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from ratel.runtime.states import export
from ratel.store import transfer
from tests.support.families import CAUSAL, batches, build, loss_fn_of

pytestmark = pytest.mark.e2e


def trained(family: str, ssd: Path) -> Session:
    session = Session(build(family), loss_fn=loss_fn_of(family), device="cpu", lr=1e-3, ssd=[ssd], tier="ssd")
    session.step(batches(family, 1)[0])
    return session


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_transformers_loads_what_was_trained(family: str, dtype: str, ssd_dir: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(export, "PIECE_ELEMENTS", 1000)
    monkeypatch.setattr(export, "SHARD_BYTES", 0)
    with trained(family, ssd_dir) as session:
        session.export(tmp_path / "model", dtype=dtype)
        masters = session.state_dict()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for name, parameter in loaded.named_parameters():
        if dtype == "fp32":
            assert torch.equal(parameter.detach(), masters[name]), name
        else:
            assert parameter.dtype is torch.bfloat16
            assert torch.equal(parameter.detach(), rounded(masters[name])), name


@pytest.mark.parametrize("piece", [1000, 4097])
def test_pieces_of_masters_need_not_end_where_parameters_do(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(build("llama-tied"), device="cpu", lr=1e-3, tier="dram") as session:
        session.step(batches("llama-tied", 1)[0])
        masters = session.state_dict()
        monkeypatch.setattr(transfer, "PIECE_ELEMENTS", piece)
        session.export(tmp_path / "model", dtype="fp32")
        again = session.state_dict()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == masters.keys() and len(saved) > 10
    assert all(torch.equal(saved[name], master) and torch.equal(again[name], master) for name, master in masters.items())


def rounded(master: torch.Tensor) -> torch.Tensor:
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def test_a_plain_module_gets_its_state_dict(ssd_dir: Path, tmp_path: Path) -> None:
    with trained("patches", ssd_dir) as session:
        session.export(tmp_path / "model", dtype="fp32")
        masters = session.state_dict()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    module = build("patches", seed=1)
    module.load_state_dict(saved)
    assert all(torch.equal(p.detach(), masters[name]) for name, p in module.named_parameters())


def test_an_older_export_is_replaced_only_by_a_complete_one(ssd_dir: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    with trained("llama", ssd_dir) as session:
        session.export(tmp_path / "model")
        before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
        session.step(batches("llama", 1)[0])

        def fail(*_: object) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(export, "_write_shards", fail)
            with pytest.raises(OSError, match="disk full"):
                session.export(tmp_path / "model")
        assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
        session.export(tmp_path / "model")
        assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} != before


def test_what_others_put_into_the_directory_stays(ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, kept = tmp_path / "there", tmp_path / "there.old"
    (there / "runs").mkdir(parents=True)
    kept.mkdir()
    (there / "runs" / "notes.txt").write_text("mine")
    (kept / "model.safetensors").write_text("mine, too")
    with trained("patches", ssd_dir) as session:
        with monkeypatch.context() as patch:
            patch.setattr(export, "SHARD_BYTES", 1)
            session.export(there, dtype="fp32")
        assert len(list(there.glob("model-00001-of-*.safetensors"))) == 1  # goes with the export that it is of
        for _ in range(2):
            session.export(there, dtype="fp32")
            assert sorted(path.name for path in there.iterdir()) == ["model.safetensors", "runs"]
        masters = session.state_dict()
    saved = load_file(there / "model.safetensors")
    assert all(torch.equal(saved[name], masters[name]) for name in masters)
    assert (there / "runs" / "notes.txt").read_text() == "mine"
    assert (kept / "model.safetensors").read_text() == "mine, too"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("there")) == ["there", "there.old"]


def test_a_link_to_a_directory_stays_one(ssd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with trained("patches", ssd_dir) as session:
        for _ in range(2):
            session.export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()


@pytest.mark.parametrize("path, message", [(".", "another directory cannot take its place"),
                                           ("..", "another directory cannot take its place"),
                                           ("/", "another directory cannot take its place"),
                                           ("/proc/model", "cannot be made")])
def test_where_no_directory_can_be_made(path: str, message: str, ssd_dir: Path) -> None:
    with trained("patches", ssd_dir) as session:
        with pytest.raises(RatelError, match=f"export: {message}"):
            session.export(path)
        if path != "/proc/model":
            with pytest.raises(RatelError, match=f"save: {message}"):
                session.save(path)
        session.step(batches("patches", 1)[0])  # nothing has ended


def test_refusals(ssd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with trained("llama", ssd_dir) as session:
        with pytest.raises(RatelError, match="is a file"):
            session.export(tmp_path / "file")
        with pytest.raises(RatelError, match="dtype: not a type of computation"):
            session.export(tmp_path / "model", dtype="fp8")
    with Session(build("llama"), device="cpu", ssd=[ssd_dir]) as session, pytest.raises(RatelError, match="first step"):
        session.export(tmp_path / "model")


def test_the_users_module_holds_the_trained_weights_after_close(ssd_dir: Path) -> None:
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session = Session(model, device="cpu", lr=1e-2, ssd=[ssd_dir], tier="ssd")
    session.step(batches("llama", 1)[0])
    masters = session.state_dict()
    session.close()
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter.detach(), masters[name]) and not torch.equal(parameter.detach(), before[name]), name
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
