"""What a run may put where its results go: nothing that is somebody else's is replaced."""

import shutil
from pathlib import Path

import pytest

from ratel.errors import RatelError
from tests.support.ownership import everything, fill, inputs, newest, start  # noqa: F401

pytestmark = pytest.mark.e2e


# --- OUT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"mine": 1}'), ("config.json", '{"model_type": "llama"}'), ("config.json", "not JSON"), ("plan.json", "[]"),
    ("hardware.json", '{"cpu": 1}'), ("startup.json", "{}"), ("metrics.jsonl", '{"loss": 1}\n'), ("model/config.json", "{}"),
    ("model/model.safetensors", "weights"), ("model/tokenizer.json", "{}"), ("model.partial/part", "mine"), ("model", "a file"),
    ("state", "a file"), ("state/commits/manifest.json", '{"mine": 1}'), ("state/step-00000002/planes.0", "mine"),
    ("state/step-00000002", "a file")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_the_name_of_a_result_is_refused(name: str, content: str, overwrite: bool, inputs: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out / name, content)
    before = everything(out)
    with pytest.raises(RatelError, match=r"^--out: holds .*Move it away, or give another directory"):
        start(*inputs, out, steps=1, save_every=1, overwrite=overwrite)
    assert everything(out) == before


def test_what_does_not_collide_stays(inputs: tuple, tmp_path: Path) -> None:
    """The user's own files beside and inside of what a run writes, over a run and two that replace
    it."""
    mine = ["notes.txt", "model/net.py", "state/notes.txt", "state/step-00000001/why.txt", "model.old/model.safetensors"]
    out = tmp_path / "out"
    for name in mine:
        fill(out / name, f"mine: {name}")
    for options in (dict(), dict(overwrite=True), dict(overwrite=True, export=False, save_every=0), dict(overwrite=True)):
        start(*inputs, out, steps=1, **{"save_every": 1, **options})
        for name in mine:
            assert (out / name).read_text() == f"mine: {name}"


def test_an_export_that_was_changed_is_the_users(inputs: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*inputs, out, steps=1)
    config = out / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{ "mine": 1,', 1))
    before = everything(out)
    with pytest.raises(RatelError, match="holds config.json, which no export has written, or which was changed since"):
        start(*inputs, out, steps=1, overwrite=True)
    assert everything(out) == before


@pytest.mark.parametrize("where", ["model", "state/copy", "model.partial"])
@pytest.mark.parametrize("option", ["--model", "--data", "--tokenizer"])
def test_what_a_run_reads_is_not_what_it_replaces(option: str, where: str, inputs: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(inputs[0], out / where)
    shutil.copy(inputs[1], out / where / "text.jsonl")
    before = everything(out)
    model = out / where if option == "--model" else inputs[0]
    data = out / where / "text.jsonl" if option == "--data" else inputs[1]
    more = {"tokenizer": out / where} if option == "--tokenizer" else {}
    for overwrite in (False, True):
        with pytest.raises(RatelError, match=f"^{option}: lies in .*which the run replaces"):
            start(model, data, out, steps=1, export=False, overwrite=overwrite, **more)
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(RatelError, match=f"^{option}: lies in .*which the run replaces"):
        start(model, data, link, steps=1, overwrite=True, **more)
    assert everything(out) == before


def test_results_among_the_data(inputs: tuple, tmp_path: Path) -> None:
    shutil.copy(inputs[1], tmp_path / "text.jsonl")
    with pytest.raises(RatelError, match="^--out: lies in .*of which every file is read for --data"):
        start(inputs[0], tmp_path, tmp_path / "out", steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("trace, message", [("text.jsonl", "is what --data names"), ("notes.txt", "is a file that is not a trace")])
def test_a_trace_replaces_nothing_else(trace: str, message: str, inputs: tuple, tmp_path: Path) -> None:
    shutil.copy(inputs[1], tmp_path / "text.jsonl")
    (tmp_path / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(RatelError, match=f"^--trace: {message}"):
        start(inputs[0], tmp_path / "text.jsonl", tmp_path / "out", steps=1, trace=tmp_path / trace)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "state"])
def test_a_directory_that_was_moved_and_linked_back(name: str, inputs: tuple, tmp_path: Path) -> None:
    """As onto a larger disk: replaced there, and the link stays."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    start(*inputs, out, steps=1, save_every=1)
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    first = everything(elsewhere)
    start(*inputs, out, steps=2, save_every=1, overwrite=True)
    assert (out / name).is_symlink() and elsewhere.is_dir()
    assert everything(elsewhere).keys() != first.keys() or everything(elsewhere) != first
    assert newest(out).training["steps"] == 2 and (out / "model" / "model.safetensors").is_file()


def test_links_in_the_place_of_results(inputs: tuple, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("config.json", "metrics.jsonl", "plan.json"):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (out / name).symlink_to(precious)
        with pytest.raises(RatelError, match=f"holds {name}"):
            start(*inputs, out, steps=1, overwrite=True)
    assert precious.read_text() == "precious"
