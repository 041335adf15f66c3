"""What cannot be resumed is refused with its reason, and nothing in the run's directory has
changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ratel.config import resolve
from ratel.errors import RatelError
from ratel.training.output import RunDirectory
from tests.support.families import batches
from tests.support.resume import make_model, make_text, train
from tests.support.sessions import flip

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run_of_three(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with states after steps 2 and 4, and its text."""
    directory = tmp_path_factory.mktemp("run")
    text = make_text(directory / "text.jsonl")
    train(model, text, directory / "out", steps=4, save_every=2, keep=2)
    return directory / "out", text


@pytest.fixture
def out(run_of_three: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(run_of_three[0], tmp_path / "out")
    return tmp_path / "out"


def everything(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def refused(out: Path, match: str, model: Any, data: Any = None, **options: Any) -> RatelError:
    before = everything(out)
    with pytest.raises(RatelError, match=match) as caught:
        train(model, data, out, **{"steps": 6, "resume": True, **options})
    assert everything(out) == before
    return caught.value


def test_a_run_that_goes_on_is_not_called_damaged(out: Path, model: Path) -> None:
    """Its states go while they are read: whoever follows the advice for damaged ones would remove
    what is whole."""
    with RunDirectory(out) as writing:
        writing.open(keep_results=True)
        refused(out, "--out: another run is writing to it", model)
        (out / "state" / "step-00000004" / "planes.0").unlink()
        refused(out, "--out: another run is writing to it", model)


@pytest.mark.parametrize("plane", ["hi", "lo", "m", "v"])
def test_a_flipped_bit_is_named_and_so_is_the_older_state(plane: str, out: Path, model: Path) -> None:
    from ratel.runtime.states.saved_state import SavedState

    newest = out / "state" / "step-00000004"
    flip(newest / "planes.0", SavedState(newest).manifest["planes"][1][plane]["offset"] + 5)
    error = refused(out, f"plane {plane}, chunk 0", model)
    assert f"Remove {newest} to resume from {out / 'state' / 'step-00000002'}" in str(error)
    shutil.rmtree(newest)
    result = train(model, None, out, steps=6, resume=True)
    assert result.steps == 6


def test_damage_without_an_older_state(out: Path, model: Path) -> None:
    shutil.rmtree(out / "state" / "step-00000002")
    state = out / "state" / "step-00000004"
    manifest = (state / "manifest.json").read_text()
    (state / "manifest.json").write_text(manifest.replace('"slot_bytes": ', '"slot_bytes": 1'))
    refused(out, "the seal does not match.*no older state.*--overwrite", model)
    (state / "manifest.json").write_text(manifest)
    record = (state / "commit-0").read_bytes()
    (state / "commit-0").write_bytes(record.replace(b'"updates": 4', b'"updates": 5'))
    refused(out, "neither of its commit records is whole.*no older state.*--overwrite", model)


def test_a_damaged_state_under_batches_of_the_users_own(model: Path, tmp_path: Path) -> None:
    train(model, batches("llama", 4), tmp_path / "out", steps=2, save_every=1, batch_size=4)
    flip(next((tmp_path / "out" / "state").glob("*/planes.0")), 100)
    refused(tmp_path / "out", "plane hi, chunk 0", model, batches("llama", 4), batch_size=4)


def test_what_is_missing_is_named(model: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(RatelError, match="--resume: which run is to be continued is not said. Give --out"):
        resolve({"model": "demo", "resume": True})
    with pytest.raises(RatelError, match="--resume: contradicts --overwrite"):
        train(model, None, out, resume=True, overwrite=True)
    refused(tmp_path / "nowhere", "nowhere is not a directory", model)
    assert not (tmp_path / "nowhere").exists()
    shutil.rmtree(out / "state")
    refused(out, "no complete state in .*--save-every", model)
    (out / "config.json").unlink()
    refused(out, "there is no .*config.json", model)


def test_other_things_than_the_run_had(model: Path, out: Path, run_of_three: tuple[Path, Path], tmp_path: Path) -> None:
    other_text = tmp_path / "other.jsonl"
    other_text.write_text(run_of_three[1].read_text().replace("alpha", "omega"))
    refused(out, "the data was changed, and 1 of the .* documents that this epoch has had are not in it", model, other_text)
    refused(out, "different: --seq-len", model, seq_len=32)
    refused(out, "was made with seed 0", model, seed=1)
    refused(out, "was text in the run to be continued, and is batches now", model, batches("llama", 2))
    refused(out, "unit", "demo")


def test_fewer_batches_than_the_run_had(model: Path, tmp_path: Path) -> None:
    def data(count: int) -> Any:
        return iter(batches("llama", count))

    train(model, data(4), tmp_path / "out", steps=3, save_every=1, batch_size=4)
    refused(tmp_path / "out", "ended after 2 batches; the run had taken 3", model, data(2), batch_size=4)


def test_a_run_that_could_be_resumed_is_not_overwritten(model: Path, out: Path) -> None:
    refused(out, "already holds a run.*--resume to continue that run, or --overwrite", model, resume=False)
