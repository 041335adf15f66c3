"""What a session refuses: which field, how much is missing, what to do; and that nothing has been
touched by then.

Refused elsewhere, each with its test: safetensors, configurations, unknown model types, modules
without repeated blocks (models/test_refused_modules.py); batches (test_bad_batches.py); data with
its line numbers (data/test_records.py, data/test_dataset.py, test_train_e2e.py); a compiler or library that is missing
(nvme_ds/test_faults.py, op_ds/test_errors.py, test_run_sh.py); CUDA asked for and absent
(test_hardware.py, test_train_e2e.py); losses that stay NaN, a full disk (test_train_e2e.py);
options (test_config.py, test_cli.py).
"""

import errno
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nvme_ds
import ratel
from ratel.errors import RatelError
from ratel.runtime.planning import trial
from ratel.runtime.session.session import Session
from ratel.units import parse_bytes
from tests.support.families import batches, build, loss_fn_of
from tests.support.refusals import Untouched, opened, refused

pytestmark = pytest.mark.numerics


def shortage(error: RatelError) -> tuple[int, int, int]:
    """Bytes that the message says are missing, needed and allowed."""
    numbers = re.search(r"short by (\S+ \S+): (\S+ \S+) needed, (\S+ \S+) allowed", str(error)).groups()
    return tuple(parse_bytes(number.replace(" ", "")) for number in numbers)


@pytest.mark.parametrize(("options", "what", "field", "budget"), [
    (dict(tier="gpu", gpu_memory="64KiB"), "GPU memory", "gpu_memory", 64 << 10),
    (dict(tier="dram", dram="5MiB"), "DRAM", "dram", 5 << 20),
    (dict(tier="ssd", dram="5MiB"), "DRAM", "dram", 5 << 20),
])
def test_a_budget_too_small_says_by_how_much(options: dict, what: str, field: str, budget: int, ssd_dir: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    # What blocks of a CPU device take is measured in a heap, twice here, and differs by what is
    # free in it: 5 to 6 MB of this model.
    monkeypatch.setattr(trial._HostMeter, "peak_growth", lambda meter: 5_000_000)
    error = Untouched(ssd_dir).refuses(f"{what} is short by", field, **options)
    missing, needed, allowed = shortage(error)
    assert allowed == budget and missing == pytest.approx(needed - allowed, rel=0.01) and "larger --" in error.remedy
    enough = {field: int(needed * 1.02)}
    with opened(build("llama"), ssd_dir, **{**options, **enough}) as session:
        assert session.prepare(4, 16) is session.plan, "what the message says would be enough is not"


def test_inference_mode() -> None:
    batch = batches("llama", 1)[0]
    with opened(build("llama")) as session:
        with torch.inference_mode():
            for call in (lambda: session.step(batch), lambda: session.evaluate([batch]), lambda: session.prepare(4, 16)):
                refused("has no gradients", "torch.inference_mode", call)
        with torch.no_grad():
            first = session.step(batch).loss
        with torch.inference_mode():
            assert session.evaluate([batch]) < first  # without a step in it
        assert session.step(batch).loss < first


def test_more_rows_than_there_is_memory_for(ssd_dir: Path) -> None:
    """Their shape is planned with, and a batch of that shape would itself not fit."""
    with opened(build("llama"), ssd_dir) as session:
        refused("DRAM is short by .* TiB", "dram", lambda: session.prepare(10**11, 16))


def test_an_ssd_too_small_says_by_how_much(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=25, f_frsize=4096))
    missing, needed, allowed = shortage(Untouched(ssd_dir).refuses("SSD space is short by", "ssd", tier="ssd"))
    assert allowed == 25 * 4096 and missing == pytest.approx(needed - allowed, rel=0.01)


def test_a_disk_that_fills_up_in_between(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nvme_ds.files.os, "posix_fallocate", full)
    error = Untouched(ssd_dir).refuses("bytes are needed and .* are free", "ssd", tier="ssd")
    assert str(ssd_dir) in str(error)


def test_the_directory_of_another_session(ssd_dir: Path) -> None:
    with opened(build("llama"), ssd_dir, tier="ssd") as first:
        before = [first.step(batch).loss for batch in batches("llama", 1)]
        refused("in use by another", "ssd", lambda: opened(build("llama"), ssd_dir, tier="ssd").prepare(4, 16))
        assert all(first.step(batch).loss < before[0] for batch in batches("llama", 1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(ssd_dir: Path) -> None:
    ssd_dir.chmod(0o500)
    refused("is not writable", "ssd", lambda: opened(build("llama"), ssd_dir))


@pytest.mark.parametrize("directory", ["/proc/ratel", "/dev/null", "/dev/null/ratel"])
def test_what_is_no_directory(directory: str) -> None:
    model = build("llama")
    refused("cannot be made", "ssd", lambda: opened(model, Path(directory)))
    assert model(batches("llama", 1)[0]["input_ids"]).logits.isfinite().all()


def test_no_direct_io_where_it_is_insisted_on(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_ds.files, "_direct_refusal", lambda fd: "Invalid argument")
    error = Untouched(ssd_dir).refuses("no O_DIRECT", "direct", tier="ssd", direct="on")
    assert "--direct auto" in error.remedy
    with opened(build("llama"), ssd_dir, tier="ssd") as session:  # auto falls back
        assert session.step(batches("llama", 1)[0]).loss > 0 and not session._machinery.store.volume.direct


def test_a_backend_that_is_forced_and_impossible(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nvme_ds.native.library()

    class Without:
        def __getattr__(self, name: str) -> object:
            return (lambda depth: -errno.EPERM) if name == "uring_probe" else getattr(real, name)

    monkeypatch.setattr(nvme_ds.engine.native, "library", Without)
    error = Untouched(ssd_dir).refuses("io_uring is not available here", "io_backend", tier="ssd",
                                       io_backend="io_uring")
    assert "threads" in error.remedy


@pytest.mark.parametrize(("options", "message", "field"), [
    (dict(placement={"block.9": "dram"}), "no unit of the model has such a name.*block.9.*pre, block.0", "placement"),
    (dict(placement={"block.1": {"w": "dram"}}), "block.1 cannot have plane 'w'.*Planes are hi lo m v g", "placement"),
    (dict(placement={"*": "disk"}), "cannot have plane 'hi' on 'disk'.*tiers are gpu dram ssd", "placement"),
    (dict(placement={"pre": {"hi": "gpu"}}), "some planes on the GPU and some not", "placement"),
    (dict(placement={"*": 5}), "is neither a tier nor tiers by plane", "placement"),
    (dict(placement=5), "is neither a tier nor", "placement"),
    (dict(tier="disk"), "not one of the choices.*gpu or dram or ssd", "tier"),
    (dict(checkpoint_tier="disk"), "not one of the choices", "checkpoint_tier"),
    (dict(optimizer="lazy"), "not one of the choices", "optimizer"),
    (dict(dtype="fp8"), "not a type of computation", "dtype"),
    (dict(micro_batch=5), "between 1 and the 4 rows", "micro_batch"),
    (dict(micro_batch=0), "must be at least 1", "micro_batch"),
    (dict(micro_batch="many"), "not a whole number", "micro_batch"),
    (dict(dram="lots"), "not a size", "dram"),
    (dict(ssd_bandwidth="fast"), "not a size", "ssd_bandwidth"),
    (dict(ssd_bandwidth=0), "must be above 0", "ssd_bandwidth"),
    (dict(optimizer_threads=0), "must be at least 1", "optimizer_threads"),
    (dict(io_backend="posix"), "auto or io_uring or threads", "io_backend"),
    (dict(direct="maybe"), "auto or on or off", "direct"),
    (dict(betas=(0.9, 1.0)), "must be below 1", "betas"),
    (dict(weight_decay=float("nan")), "not a number", "weight_decay"),
])
def test_options(options: dict, message: str, field: str, ssd_dir: Path) -> None:
    Untouched(ssd_dir).refuses(message, field, **({"tier": "ssd"} if "placement" not in options else {}) | options)


@pytest.mark.parametrize("options", [dict(tier="ssd"), dict(placement={"block.1": {"m": "ssd"}}),
                                     dict(checkpoint_tier="ssd"), dict(placement="ssd")])
def test_ssd_without_a_directory(options: dict) -> None:
    model = build("llama")
    session = opened(model, **options)
    assert "--ssd DIR" in refused("no directory was given", "ssd", lambda: session.prepare(4, 16)).remedy
    session.close()
    assert model(batches("llama", 1)[0]["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("seed", [2**63 - 1, 10**23])
def test_any_seed_will_do(seed: int, ssd_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         vocab_size=64)
    with Session(config, device="cpu", seed=seed) as session:
        assert math.isfinite(session.step({"input_ids": torch.ones(2, 8, dtype=torch.long)}).loss)
        session.save(tmp_path / "state")
    with Session(config, device="cpu", seed=seed) as session:
        session.load(tmp_path / "state")
        assert math.isfinite(session.step({"input_ids": torch.ones(2, 8, dtype=torch.long)}).loss)


def test_a_model_without_weights_that_cannot_be_given_any(ssd_dir: Path) -> None:
    from tests.support.families import Patches

    with torch.device("meta"):
        model = Patches()
    refused("no reset_parameters", "model", lambda: opened(model, ssd_dir, loss_fn=loss_fn_of("patches")))
    assert all(p.device.type == "meta" for p in model.parameters()), "the refused module was left a skeleton"


# --- one module, two sessions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "model"])
def test_a_module_is_in_one_session_at_a_time(part: str, ssd_dir: Path) -> None:
    """Also a part of one. The first session goes on, and gives back what it has trained; the next
    one may then begin."""
    model = build("llama")
    with opened(model, ssd_dir) as first:
        loss_fn = (lambda module, batch: module(**batch).last_hidden_state.square().mean(dim=(1, 2)).sum()) if part else None
        refused("in another session, which is not closed", "model",
                lambda: opened(model.get_submodule(part), loss_fn=loss_fn))
        assert first.step(batches("llama", 1)[0]).loss > 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with opened(model) as second:
        second.step(batches("llama", 1)[0])
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_module_with_its_own_loss_needs_batches(tmp_path: Path) -> None:
    refused("is missing: what a module with its own loss learns from", "data",
            lambda: ratel.train(build("patches"), loss_fn=loss_fn_of("patches"), steps=1, device="cpu", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# --- what a newcomer met ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "abc", True])
def test_learning_rates(value: object, ssd_dir: Path) -> None:
    refused("finite number, 0 or more", "lr", lambda: opened(build("llama"), ssd_dir, lr=value))
    with opened(build("llama"), ssd_dir) as session:
        batch = batches("llama", 1)[0]
        session.step(batch)
        refused("finite number, 0 or more", "lr", lambda: session.step(batch, lr=value))
        assert not session.step(batch).skipped


def test_budgets_and_directories_of_a_session(ssd_dir: Path) -> None:
    for value in (0, True, -1):
        refused("above 0|negative", "dram", lambda: opened(build("llama"), ssd_dir, dram=value))
    refused("is given twice", "ssd", lambda: Session(build("llama"), device="cpu", ssd=[ssd_dir, f"{ssd_dir}/."]))


def test_no_room_for_the_trained_model_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.runtime.states import export

    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    options = dict(steps=1, batch_size=2, seq_len=16, device="cpu", out=str(tmp_path / "run"))
    refused("has 1000 B free, and what was trained takes", "--out", lambda: ratel.train("demo", **options))
    assert not (tmp_path / "run").exists()
    ratel.train("demo", **options, export=False)
    ratel.train("demo", **options, overwrite=True)  # what was there makes room


def test_a_model_that_cannot_be_written_leaves_a_session_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.runtime.states import export

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(build("llama")) as session:
        session.step(batches("llama", 1)[0])
        with monkeypatch.context() as patched:
            patched.setattr(export, "write_shards", full)
            refused("cannot be written.*No space left", "export", lambda: session.export(tmp_path / "model"))
        assert list(tmp_path.iterdir()) == []
        assert session.export(tmp_path / "model").is_dir() and not session.step(batches("llama", 1)[0]).skipped
