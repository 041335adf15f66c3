"""Whose files are whose: nothing that a run did not write is written to or removed, whatever has
the names of its files.

Kills between copies and moves are in move_run.py, lost disk caches in test_power_loss.py.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ratel.cli import main
from ratel.errors import RatelError
from ratel.ownership import stamps
from ratel.ownership.stamps import STAMP_BYTES, Stamp, belongs_to, mark_of, new_volume_name, read_stamp, write_stamp
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from tests.support.families import batches, build
from tests.support.ownership import committed, everything, fill, inputs, newest, start  # noqa: F401
from tests.support.resume import assert_same_run

pytestmark = pytest.mark.e2e


# --- copies ---------------------------------------------------------------------------------------------------------


def test_a_copied_run_goes_on_in_files_of_its_own(inputs: tuple, ssd_dir: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """And the original, which nobody has touched, as if there were no copy."""
    original, copy = committed(inputs, tmp_path / "a", ssd_dir), tmp_path / "b"
    shutil.copytree(original, copy)
    before = everything(original, ssd_dir)
    capsys.readouterr()
    committed(inputs, copy, ssd_dir, steps=5, resume=True, quiet=False)
    assert "is a copy" in capsys.readouterr().out
    assert everything(original) | {path: path.read_bytes() for path in before if path.parent == ssd_dir} == before
    assert not newest(copy).is_foreign and not set(newest(copy).files) & set(newest(original).files)
    committed(inputs, original, ssd_dir, steps=5, resume=True)
    assert_same_run(copy, original)
    assert newest(copy).verify() == newest(original).verify() > 0


def test_overwriting_a_copy_removes_what_is_the_copys(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    original, copy = committed(inputs, tmp_path / "a", ssd_dir), tmp_path / "b"
    shutil.copytree(original, copy)
    before = everything(original, ssd_dir)
    start(*inputs, copy, steps=2, overwrite=True)
    assert everything(original, ssd_dir) == before
    assert not (copy / "state").exists()


def test_a_copy_that_its_original_has_written_over_is_refused(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    original, copy = committed(inputs, tmp_path / "a", ssd_dir), tmp_path / "b"
    shutil.copytree(original, copy)
    committed(inputs, original, ssd_dir, steps=6, resume=True)
    before = everything(original, ssd_dir)
    with pytest.raises(RatelError, match="is damaged"):
        committed(inputs, copy, ssd_dir, steps=6, resume=True)
    assert everything(original, ssd_dir) == before


def test_a_moved_run_goes_on_in_the_same_files(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    """OUT and the directories on drives have other names; the manifest says the new ones from then
    on."""
    out = committed(inputs, tmp_path / "a", [ssd_dir / "a", ssd_dir / "b"])
    inodes = [path.stat().st_ino for path in newest(out).files]
    out = out.rename(tmp_path / "moved")
    (ssd_dir / "a").rename(ssd_dir / "c"), (ssd_dir / "b").rename(ssd_dir / "d")
    with pytest.raises(RatelError, match="is not there.*mounted elsewhere.*--ssd"):
        committed(inputs, out, [ssd_dir / "a", ssd_dir / "b"], steps=5, resume=True)
    assert sorted(path.name for path in ssd_dir.iterdir()) == ["c", "d"]  # nothing was made in their place
    folders = f"{ssd_dir / 'c'},{ssd_dir / 'd'}"
    assert main(["check", str(out)]) == 2 and main(["check", str(out), "--ssd", folders]) == 0
    assert main(["export", "--state", str(out), "--out", str(tmp_path / "exported"), "--ssd", folders]) == 0
    committed(inputs, out, [ssd_dir / "c", ssd_dir / "d"], steps=5, resume=True)
    saved = newest(out)
    assert [path.stat().st_ino for path in saved.files] == inodes and saved.verify() > 0 and not saved.is_foreign
    assert len(everything(ssd_dir)) == 2


def test_a_directory_and_its_snapshot(ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no number tells two apart, the one that is where the stamp says is the owner; alone,
    either is."""
    monkeypatch.setattr(stamps, "mark_of", lambda directory: "the same" if directory.is_dir() else None)
    volume, file = new_volume_name(), None
    file = ssd_dir / f"{volume}.0"
    file.write_bytes(bytes(2 * STAMP_BYTES))
    original, snapshot = tmp_path / "a", tmp_path / "b"
    original.mkdir(), snapshot.mkdir()
    write_stamp(file, Stamp(volume=volume, index=0, commits=os.fspath(original), owner="the same"))
    assert belongs_to(file, original) and not belongs_to(file, snapshot)
    original.rmdir()
    assert belongs_to(file, snapshot)


def test_what_is_no_file_of_ours(ssd_dir: Path, tmp_path: Path) -> None:
    volume, commits = new_volume_name(), tmp_path / "commits"
    commits.mkdir()
    path = ssd_dir / f"{volume}.0"
    stamp = Stamp(volume=volume, index=0, commits=os.fspath(commits), owner=mark_of(commits))
    path.write_bytes(bytes(STAMP_BYTES) + stamp.pack())
    assert read_stamp(path) == stamp and belongs_to(path, commits)
    for change in (lambda: os.link(path, ssd_dir / "other"), lambda: path.rename(ssd_dir / f"{volume}.1"),
                   lambda: (path.rename(ssd_dir / "real"), path.symlink_to(ssd_dir / "real")), lambda: os.truncate(path, 6000)):
        assert belongs_to(path, commits)
        change()
        assert not belongs_to(path, commits)
        for entry in ssd_dir.iterdir():
            entry.unlink()
        path.write_bytes(bytes(STAMP_BYTES) + stamp.pack())


# --- what a manifest says -------------------------------------------------------------------------------------------


def test_a_manifest_that_names_somebody_elses_files(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    """Neither a file of the user nor those of another run go with the run that is overwritten."""
    other = committed(inputs, tmp_path / "other", ssd_dir)
    thesis, out = tmp_path / "thesis.tex", committed(inputs, tmp_path / "out", ssd_dir / "own")
    thesis.write_text("thesis")
    manifest = out / "state" / "commits" / "manifest.json"
    content = {key: value for key, value in json.loads(manifest.read_bytes()).items() if key != "seal"}
    content["files"] = ["../../../thesis.tex", os.fspath(thesis), *map(os.fspath, newest(other).files)]
    manifest.write_text(json.dumps({**content, "seal": zlib.crc32(json.dumps(content).encode())}))
    before = everything(other) | {path: path.read_bytes() for path in newest(other).files}
    start(*inputs, out, steps=2, overwrite=True)
    assert thesis.read_text() == "thesis" and newest(other).verify() > 0
    assert everything(other) | {path: path.read_bytes() for path in newest(other).files} == before


# --- SSD directories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["state", "state/new", "model", "model/new"])
def test_ssd_files_inside_what_goes(where: str, inputs: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RatelError, match="^--ssd: lies in .*which the run replaces"):
        committed(inputs, out, out / where, overwrite=True)
    assert not out.exists()


@pytest.mark.parametrize("name", ["ratel-states.0", "ratel-gradients.0"])
@pytest.mark.parametrize("kind", ["link", "dangling", "second name", "pipe", "directory", "file"])
def test_what_was_planted_on_an_ssd(kind: str, name: str, ssd_dir: Path, tmp_path: Path) -> None:
    precious, planted = tmp_path / "precious", ssd_dir / name
    precious.write_text("precious" * 1000)
    if kind in ("link", "dangling"):
        planted.symlink_to(precious if kind == "link" else tmp_path / "nowhere")
    elif kind == "second name":
        os.link(precious, planted)
    elif kind == "pipe":
        os.mkfifo(planted)
    elif kind == "directory":
        planted.mkdir()
    else:
        shutil.copy(precious, planted)
    with Session(build("llama"), device="cpu", ssd=[ssd_dir], tier="ssd", micro_batch=2) as session:
        with pytest.raises(RatelError, match="^ssd: "):
            session.step(batches("llama", 1)[0])
    assert precious.read_text() == "precious" * 1000 and os.path.lexists(planted) and not (tmp_path / "nowhere").exists()
    assert kind != "file" or planted.read_text() == precious.read_text()
    assert os.listdir(ssd_dir) == [name]


def test_what_a_killed_run_leaves_goes_with_the_next(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    """Whatever the next one is and keeps there; a file that only looks like one stays."""
    volume = new_volume_name()
    for name in ("ratel-states", "ratel-gradients", volume):
        (ssd_dir / f"{name}.0").write_bytes(bytes(STAMP_BYTES) + Stamp(volume=name, index=0).pack())
    (ssd_dir / "ratel-activations.0").write_bytes(b"mine" * 4096)
    start(*inputs, tmp_path / "out", steps=1, ssd=[ssd_dir], tier="dram")
    assert os.listdir(ssd_dir) == ["ratel-activations.0"]


def test_the_doctor_says_what_lies_there(inputs: tuple, ssd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose it is, and how to be rid of what nobody needs: files of a killed run, and those of
    commits that are gone."""
    out, gone = committed(inputs, tmp_path / "out", ssd_dir), committed(inputs, tmp_path / "gone", ssd_dir)
    of_gone = newest(gone).files[0]
    shutil.rmtree(gone)
    (ssd_dir / "ratel-states.0").write_bytes(bytes(STAMP_BYTES) + Stamp(volume="ratel-states", index=0).pack())
    (ssd_dir / "mine.0").write_text("mine")
    before = everything(ssd_dir)
    assert main(["doctor", "--no-measure", "--json", "--ssd", str(ssd_dir)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {Path(file["path"]): file["of"] for file in report["ssd"][0]["files"]} == {
        ssd_dir / "ratel-states.0": "left over", newest(out).files[0]: "kept", of_gone: "without commits"}
    advice = [line for line in report["advice"] if "`rm " in line]
    assert len(advice) == 2 and any(f"`rm {of_gone}`" in line and str(gone) in line for line in advice)
    assert main(["doctor", "--no-measure", "--ssd", str(ssd_dir)]) == 0
    assert f"{of_gone}" in capsys.readouterr().out and everything(ssd_dir) == before


def test_files_that_vanish_under_a_run_are_noticed(ssd_dir: Path, tmp_path: Path) -> None:
    """Before a commit says that it lasts."""
    for number, harm in enumerate((os.unlink, lambda path: os.truncate(path, 8192), lambda path: os.replace(path, f"{path}.mine"))):
        commits = tmp_path / f"commits-{number}"
        session = Session(build("llama"), device="cpu", ssd=[ssd_dir / str(number)], tier="dram", durable="step", commits=commits,
                          micro_batch=2, lr=1e-3)
        session.step(batches("llama", 1)[0])
        session.commit(wait=True)
        harm(SavedState(commits).files[0])
        sequence = SavedState(commits).commit.sequence
        with pytest.raises(Exception, match="removed, replaced or cut short"):
            session.step(batches("llama", 1)[0])
            session.commit(wait=True)
        session.close()
        assert SavedState(commits).commit.sequence == sequence


# --- the session ----------------------------------------------------------------------------------------------------


def test_a_session_writes_over_no_model_and_no_state_of_others(ssd_dir: Path, tmp_path: Path) -> None:
    fill(tmp_path / "state" / "manifest.json", "mine")
    fill(tmp_path / "state.partial" / "notes.txt", "mine")
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    fill(tmp_path / "kept.partial" / "thesis.tex", "mine")
    before = everything(tmp_path)
    with pytest.raises(RatelError, match="^commits: holds manifest.json, which is not of a training state"):
        Session(build("llama"), device="cpu", ssd=[ssd_dir], durable="step", commits=tmp_path / "state")
    with Session(build("llama"), device="cpu", ssd=[ssd_dir], tier="ssd", micro_batch=2) as session:
        session.step(batches("llama", 1)[0])
        for act, message in ((lambda: session.save(tmp_path / "state"), "save: holds manifest.json"),
                             (lambda: session.save(tmp_path / "kept"), "save: holds thesis.tex"),
                             (lambda: session.export(tmp_path / "model"), "export: holds model.safetensors"),
                             (lambda: session.export(tmp_path / "kept"), "export: holds thesis.tex")):
            with pytest.raises(RatelError, match=message):
                act()
        session.step(batches("llama", 1)[0])  # nothing has ended
    assert everything(tmp_path) == before


def test_a_session_replaces_nothing_that_it_uses(inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    """A state's or a model's directory goes as a whole when it is replaced."""
    with pytest.raises(RatelError, match="^commits: ssd .* is in it"):
        Session(build("llama"), device="cpu", ssd=[tmp_path / "commits" / "ssd"], durable="step", commits=tmp_path / "commits")
    model = tmp_path / "model"
    shutil.copytree(inputs[0], model)
    before = everything(model)
    with Session(model, device="cpu", ssd=[ssd_dir], tier="ssd", micro_batch=2) as session:
        session.step({"input_ids": torch.zeros(2, 8, dtype=torch.long)})
        for act in (session.save, session.export):
            for path, name in ((model, "model"), (ssd_dir, "ssd"), (tmp_path / "link", "model")):
                (tmp_path / "link").symlink_to(model) if not (tmp_path / "link").exists() else None
                with pytest.raises(RatelError, match=f"{name} .* is in it, which the session uses"):
                    act(path)
    assert everything(model) == before


@pytest.mark.parametrize("name", ["commits/manifest.json", "step-00000001/manifest.json", "step-00000001/planes.0", "commits.old/notes"])
def test_overwriting_removes_no_state_that_is_none(name: str, inputs: tuple, tmp_path: Path) -> None:
    """Where the new run keeps no states, what has their names is in nobody's way."""
    out = tmp_path / "out"
    start(*inputs, out, steps=1)
    fill(out / "state" / name, "mine")
    start(*inputs, out, steps=1, overwrite=True)
    assert (out / "state" / name).read_text() == "mine"


def test_a_mark_of_an_unfinished_export_in_a_users_model(inputs: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out / "model" / "net.py", "mine")
    fill(out / "model" / ".ratel-unfinished", "")
    start(*inputs, out, steps=1, overwrite=True, export=False)
    assert (out / "model" / "net.py").read_text() == "mine"


def test_a_state_that_was_kept_beside_stays(ssd_dir: Path, tmp_path: Path) -> None:
    with Session(build("llama"), device="cpu", ssd=[ssd_dir], tier="ssd", micro_batch=2) as session:
        for _ in range(2):
            session.step(batches("llama", 1)[0])
            session.save(tmp_path / "state")
            (tmp_path / "state").rename(tmp_path / "state.old") if not (tmp_path / "state.old").exists() else None
            session.save(tmp_path / "state")
    assert SavedState(tmp_path / "state.old").training["steps"] == 1 and SavedState(tmp_path / "state").training["steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "state.old"]


def test_moments_replace_moments_only(tmp_path: Path) -> None:
    """Nothing is known of another program's file of that name, so it stays."""
    import ratel

    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for _ in range(2):
        ratel.save_adamw_state(tmp_path, module, optimizer)
    assert os.listdir(tmp_path) == ["optimizer.safetensors"]
    save_file({"weight": torch.zeros(2)}, tmp_path / "optimizer.safetensors")
    before = everything(tmp_path)
    with pytest.raises(RatelError, match="holds no moments that Ratel has written"):
        ratel.save_adamw_state(tmp_path, module, optimizer)
    assert everything(tmp_path) == before
