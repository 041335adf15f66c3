"""Frozen parameters: one place on SSD, in no state, named by their content; and training is what it
was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ratel.errors import RatelError
from ratel.planner.formats import EXACT, PLANES
from ratel.planner.slot_layout import pieces
from ratel.runtime.session.session import Session
from ratel.runtime.states.format import COMMITS, MANIFEST, PLANES_FILE, Commit, describe_model, pack_commit
from ratel.runtime.states.saved_state import SavedState
from ratel.units import align_up
from tests.runtime.streams.test_concurrency import with_frozen
from tests.runtime.streams.test_placement import MIXED, SMALL
from tests.support.families import batches

pytestmark = pytest.mark.e2e
PLACES = {"ssd": {"*": "ssd"}, "dram": {"*": "dram"}, "gpu": {"*": "gpu"}, "mixed": MIXED}
MOSTLY = ("embed", "lm_head", "mlp", "layers.1.", "k_proj", "v_proj", "o_proj")
"""What of llama is frozen here, 92% of it: what comes before the blocks, a block, most of the
others."""


def opened(ssd: Path, place: str = "ssd", **options: Any) -> Session:
    model = options.pop("model", None) or with_frozen(*MOSTLY)
    return Session(model, device="cpu", ssd=[ssd], lr=1e-2, micro_batch=2, placement=PLACES[place], **options)


def everything(session: Session) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in session.state_dict().items() if isinstance(value, Tensor)}


def train(session: Session, steps: list[Any]) -> dict[str, Tensor]:
    for batch in steps:
        session.step(batch)
    return everything(session)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    return batches("llama", 4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> dict[str, Tensor]:
    with opened(tmp_path_factory.mktemp("ssd"), "dram") as session:
        return train(session, steps)


# --- bytes ----------------------------------------------------------------------------------------------------------


def paged(*sizes: int) -> int:
    return sum(align_up(size, 4096) for size in sizes)


@pytest.mark.parametrize("durable", ["step", "checkpoint"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_on_ssd_and_in_a_state_are_what_the_formula_says(durable: str, dtype: str, ssd_dir: Path, tmp_path: Path,
                                                               steps: list[Any]) -> None:
    """12 bytes of what is trained in each version; of what is frozen 2 (in fp32 4), once and in no
    state."""
    options = dict(commits=tmp_path / "commits") if durable == "step" else {}
    with opened(ssd_dir, dtype=dtype, durable=durable, **options) as session:
        session.step(steps[0])
        units, slots = session.plan.spec.units, session.plan.num_slots
        trained, frozen = (sum(p.num_elements for u in units for p in u.params if p.trainable is one) for one in (True, False))
        assert frozen > 0.9 * (trained + frozen) and slots == (2 if durable == "step" else 1)
        width = {"hi": 2, "lo": 2, "m": 4, "v": 4}
        changing = sum(paged(u.num_trainable * width[p]) for u in units for p in width)
        kept = sum(paged((u.num_elements - u.num_trainable) * width[p]) for u in units for p in (("hi", "lo") if dtype == "fp32" else ("hi",)))
        assert session.plan.ssd_items["planes"] == slots * changing and session.plan.ssd_items["frozen planes"] == kept
        sizes = {path.name: path.stat().st_size - 4096 for path in ssd_dir.iterdir()}
        assert sizes["ratel-frozen.0"] == kept
        assert sum(size for name, size in sizes.items() if name not in ("ratel-frozen.0", "ratel-gradients.0")) == slots * changing
        session.save(tmp_path / "state")
        if durable == "step":
            session.commit(wait=True)
    assert os.path.getsize(tmp_path / "state" / PLANES_FILE) == changing
    assert SavedState(tmp_path / "state").num_bytes == sum(u.num_trainable for u in units) * 12
    left = {path.name for path in ssd_dir.iterdir()}
    assert not any("frozen" in name for name in left), "what is frozen goes with its session"


def test_a_save_reads_nothing_of_what_is_frozen(ssd_dir: Path, tmp_path: Path, steps: list[Any]) -> None:
    with opened(ssd_dir) as session:
        session.step(steps[0])
        session.save(tmp_path / "first")  # which reads it once, for its name
        session.flush()
        engine, plan = session._machinery.engine, session.plan
        before = engine.stats()["bytes_read"]
        session.save(tmp_path / "second")
        assert plan.state_bytes == sum(u.num_trainable for u in plan.spec.units) * 12
        assert engine.stats()["bytes_read"] - before == plan.state_bytes
    assert SavedState(tmp_path / "second").base == SavedState(tmp_path / "first").base


# --- the same training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "optimizer"), [("ssd", "deferred"), ("ssd", "eager"), ("ssd", "speculative"), ("mixed", "deferred"),
                                                  ("gpu", "deferred")])
def test_training_is_the_same_on_every_tier(place: str, optimizer: str, ssd_dir: Path, tmp_path: Path, steps: list[Any]) -> None:
    clip = 0.0 if optimizer == "eager" else 100.0
    with opened(ssd_dir, "dram", optimizer=optimizer, max_grad_norm=clip) as session:
        expected = train(session, steps)
    with opened(ssd_dir, place, optimizer=optimizer, max_grad_norm=clip, buffers=SMALL, durable="step",
                      commits=tmp_path / "commits") as session:
        for batch in steps:
            session.step(batch)
            session.commit()
        assert_equal(everything(session), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("places", [("dram", "ssd"), ("ssd", "gpu"), ("gpu", "mixed")])
def test_a_state_goes_on_with_the_same_base(places: tuple[str, str], dtype: str, ssd_dir: Path, tmp_path: Path,
                                            steps: list[Any]) -> None:
    with opened(ssd_dir, "dram", dtype=dtype) as session:
        expected = train(session, steps)
    with opened(ssd_dir, places[0], dtype=dtype) as session:
        train(session, steps[:2])
        session.save(tmp_path / "state")
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with opened(ssd_dir, places[1], dtype=dtype) as session:
        session.load(tmp_path / "copy")
        assert_equal(train(session, steps[2:]), expected)


@pytest.mark.parametrize("places", [("dram", "ssd"), ("ssd", "mixed"), ("ssd", "ssd")])
def test_commits_go_on_in_place(places: tuple[str, str], ssd_dir: Path, tmp_path: Path, steps: list[Any],
                                uninterrupted: dict[str, Tensor]) -> None:
    commits = tmp_path / "commits"
    for index, place in enumerate(places):
        with opened(ssd_dir, place, durable="step", commits=commits) as session:
            if index:
                session.load(commits)
            for batch in steps[2 * index : 2 * index + 2]:
                session.step(batch)
                session.commit()
            found = everything(session)
    assert_equal(found, uninterrupted)
    assert SavedState(commits).verify() == SavedState(commits).num_bytes


# --- another base ---------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_nothing_is_changed(ssd_dir: Path, tmp_path: Path, steps: list[Any]) -> None:
    commits = tmp_path / "commits"
    with opened(ssd_dir, durable="step", commits=commits) as session:
        session.step(steps[0])
        session.commit(wait=True)
    before = {path: path.read_bytes() for path in [*commits.iterdir(), *ssd_dir.iterdir()]}
    other = with_frozen(*MOSTLY)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.25
    with opened(ssd_dir, model=other, durable="step", commits=commits) as session:
        session.load(commits)
        with pytest.raises(RatelError, match="model: its frozen parameters of block.1 are not those that the state was trained with"):
            session.step(steps[1])
    assert {path: path.read_bytes() for path in [*commits.iterdir(), *ssd_dir.iterdir()]} == before


def test_a_trained_weight_may_differ_since_the_state_has_it(ssd_dir: Path, tmp_path: Path, steps: list[Any],
                                                            uninterrupted: dict[str, Tensor]) -> None:
    with opened(ssd_dir) as session:
        train(session, steps[:2])
        session.save(tmp_path / "state")
    other = with_frozen(*MOSTLY)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.zero_()
    with opened(ssd_dir, model=other) as session:
        session.load(tmp_path / "state")
        assert_equal(train(session, steps[2:]), uninterrupted)


# --- states of before -----------------------------------------------------------------------------------------------


def test_states_that_hold_what_is_frozen_are_read(ssd_dir: Path, tmp_path: Path, steps: list[Any],
                                                  uninterrupted: dict[str, Tensor]) -> None:
    """Version 3: then the state's own frozen parameters count, whatever the model's are."""
    with opened(ssd_dir) as session:
        train(session, steps[:2])
        training = SavedState(session.save(tmp_path / "new")).training
        save_with_frozen(session, training, tmp_path / "old")
    assert SavedState(tmp_path / "old").verify() > SavedState(tmp_path / "new").num_bytes
    other = with_frozen(*MOSTLY)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    with opened(ssd_dir, model=other) as session:
        session.load(tmp_path / "old")
        assert_equal(train(session, steps[2:]), uninterrupted)


def save_with_frozen(session: Session, training: dict[str, Any], path: Path) -> None:
    """As it was written before a state could name what it does not hold."""
    path.mkdir()
    sums, places, content = [], [], b""
    for unit in session.plan.spec.units:
        places.append({})
        for name in PLANES:
            count = EXACT["bf16"].num_elements(unit, name)
            if count:
                values = session.read_state(unit, name)
                data = values.view(torch.uint8).numpy().tobytes()
                places[-1][name] = {"offset": len(content), "num_elements": count}
                content += data + b"\0" * (-len(data) % 4096)
                item = values.element_size()
                sums += [zlib.crc32(data[a * item : b * item]) for a, b in pieces(unit, count, session.plan.grain)]
    manifest = {"format": "ratel-state", "version": 3, "checksum": "crc32", "grain": session.plan.grain, "num_slots": 1,
                "slot_bytes": len(content), "files": [PLANES_FILE], "pattern": [0], "stripe_bytes": 1 << 20, "planes": places,
                "model": describe_model(session.plan.spec)}
    (path / PLANES_FILE).write_bytes(content)
    (path / MANIFEST).write_bytes(json.dumps({**manifest, "seal": zlib.crc32(json.dumps(manifest).encode())}).encode())
    import numpy as np

    (path / COMMITS[0]).write_bytes(pack_commit(Commit(
        sequence=0, slots=[0] * len(places), training={key: value for key, value in training.items() if key != "base"},
        checksums=np.array(sums, dtype=np.uint32))))


# --- what comes out -------------------------------------------------------------------------------------------------


def test_exports_are_whole_and_a_state_is_exported_with_its_base(ssd_dir: Path, tmp_path: Path, steps: list[Any],
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from ratel.cli import main

    with_frozen().save_pretrained(tmp_path / "model")
    with opened(ssd_dir, dtype="bf16") as session:
        train(session, steps[:2])
        session.export(tmp_path / "live", dtype="fp32")
        session.save(tmp_path / "state")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "live", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["export", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "again")]) == 2
    assert f"{sum(p.numel() for p in frozen_of_model()):,} frozen parameters the state does not hold" in capsys.readouterr().err
    arguments = ["export", "--state", str(tmp_path / "state"), "--dtype", "fp32"]
    assert main([*arguments, "--model", str(tmp_path / "moved"), "--out", str(tmp_path / "again")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert_equal(again, loaded.state_dict())
    other = with_frozen()
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    assert main([*arguments, "--model", str(tmp_path / "other"), "--out", str(tmp_path / "never")]) == 2
    assert "frozen parameters of pre are not those" in capsys.readouterr().err and not (tmp_path / "never").exists()
    assert main(["check", str(tmp_path / "state"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen_parameters"] == sum(p.numel() for p in frozen_of_model())


def frozen_of_model() -> list[Tensor]:
    return [p for p in with_frozen(*MOSTLY).parameters() if not p.requires_grad]


def test_a_run_is_resumed_with_its_base_alone(ssd_dir: Path, tmp_path: Path) -> None:
    """By `ratel.train`, with commits; a refusal leaves every file of the run as it is."""
    import ratel

    data = batches("llama", 6)

    def run(out: Path, steps: int, model: Any = None, **options: Any) -> None:
        ratel.train(model or with_frozen(*MOSTLY), data, out=out, steps=steps, device="cpu", warmup_steps=0, save_every=2, lr=1e-3,
                    schedule="constant", durable="step", ssd=[ssd_dir], **options)

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for top in (tmp_path, ssd_dir) for path in top.rglob("*") if path.is_file()}

    run(tmp_path / "whole", 6)
    run(tmp_path / "halves", 4)
    before, other = files(), with_frozen(*MOSTLY)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(RatelError, match="its frozen parameters of post are not those"):
        run(tmp_path / "halves", 6, other, resume=True)
    assert files() == before
    run(tmp_path / "halves", 6, resume=True)
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("halves", "whole"))
    assert_equal(found, expected)


# --- a kill ---------------------------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from pathlib import Path
import ratel.runtime.states.targets as targets
from tests.support.families import batches
from tests.runtime.states.test_frozen import opened
ssd, commits, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
write = targets.write_synced
def dying(path, content):
    if "commit-" in path.name and targets_seen.append(path) is None and len(targets_seen) == 3:
        if moment == "after":
            write(path, content)
        elif moment == "middle":
            path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
targets_seen = []
targets.write_synced = dying
with opened(ssd, durable="step", commits=commits) as session:
    for batch in batches("llama", 4):
        session.step(batch)
        session.commit(wait=True)
"""


@pytest.mark.parametrize("moment", ["before", "middle", "after"])
def test_a_kill_within_a_commit_loses_no_durable_step(moment: str, ssd_dir: Path, tmp_path: Path, steps: list[Any],
                                                      uninterrupted: dict[str, Tensor]) -> None:
    commits = tmp_path / "commits"
    ended = subprocess.run([sys.executable, "-c", _CHILD, str(ssd_dir), str(commits), moment],
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -signal.SIGKILL
    assert (ssd_dir / "ratel-frozen.0").exists(), "what it left is removed by the next run"
    with opened(ssd_dir, durable="step", commits=commits) as session:
        session.load(commits)
        done = SavedState(commits).training["steps"]
        assert done == (3 if moment == "after" else 2)
        for batch in steps[done:]:
            session.step(batch)
            session.commit()
        assert_equal(everything(session), uninterrupted)
    assert not (ssd_dir / "ratel-frozen.0").exists()
