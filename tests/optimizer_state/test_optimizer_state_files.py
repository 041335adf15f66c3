"""Files of optimizer states in PyTorch: what is written and read, and what both sides refuse."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ratel
from ratel.errors import RatelError
from ratel.models.safetensors import writer as shards
from ratel.optimizer_state import adamw, load_adamw_state, save_adamw_state, writing
from tests.support.families import ROWS, batches, build
from tests.optimizer_state.states import HALF, LR, Plain, everything, freeze, open_decaying

pytestmark = pytest.mark.e2e


def test_the_file_says_what_the_document_says(tmp_path: Path) -> None:
    half = trained("llama-tied", HALF)
    assert save_adamw_state(tmp_path / "new" / "half", half.model, half.optimizer) == tmp_path / "new" / "half"
    assert [path.name for path in (tmp_path / "new" / "half").iterdir()] == ["optimizer.safetensors"]
    with safe_open(tmp_path / "new" / "half" / "optimizer.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "ratel-adamw", "version": "1", "step": str(HALF)}
        names = [name for name, _ in half.model.named_parameters()]
        assert sorted(file.keys()) == sorted(f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in names)
        for name, p in half.masters.items():
            assert torch.equal(file.get_tensor(f"exp_avg_sq.{name}"), half.optimizer.state[p]["exp_avg_sq"])


@cache
def trained(family: str, steps: int) -> Plain:
    """Nobody changes it."""
    return Plain(family).run(family, 0, steps)


def saved(tmp_path: Path, steps: int = HALF, family: str = "llama", name: str = "half") -> Path:
    run = trained(family, steps)
    return save_adamw_state(tmp_path / name, run.model, run.optimizer)


@pytest.mark.parametrize("kind", [dict(foreach=True), dict(fused=True), dict(capturable=False)])
def test_states_are_as_torch_makes_them(kind: dict[str, bool], tmp_path: Path) -> None:
    """Any grouping and kernel: the optimizer goes on, and its state dict has the dtypes and places
    of a fresh one."""
    path = saved(tmp_path)
    model = build("llama")
    optimizer = torch.optim.AdamW([{"params": [p]} for p in reversed(list(model.parameters()))], lr=LR, **kind)
    load_adamw_state(path, model, optimizer)
    fresh = torch.optim.AdamW(build("llama").parameters(), lr=LR, **kind)
    for group in (*optimizer.param_groups, *fresh.param_groups):
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    fresh.step()
    like = next(iter(fresh.state.values()))
    for p in model.parameters():
        state = optimizer.state[p]
        assert {k: (v.dtype, v.device) for k, v in state.items()} == {k: (v.dtype, v.device) for k, v in like.items()}
        assert state["step"] == HALF and state["exp_avg"].shape == p.shape and state["exp_avg_sq"].any()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {HALF + 1}


def test_the_states_take_the_dtype_of_the_parameters(tmp_path: Path) -> None:
    model = build("llama").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    load_adamw_state(saved(tmp_path), model, optimizer)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    again = save_adamw_state(tmp_path / "again.safetensors", model, optimizer)
    values = load_file(again)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert torch.equal(values["exp_avg.model.norm.weight"], optimizer.state[model.model.norm.weight]["exp_avg"].float())


@pytest.mark.parametrize("whole", [False, True])
def test_a_newer_set_takes_the_place_of_an_older_one(whole: bool, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded after whole and whole after sharded; and only once it is complete."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 30 if whole else 0)
    saved(tmp_path, 1)
    monkeypatch.setattr(shards, "SHARD_BYTES", 0 if whole else 1 << 30)
    before = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}

    def fail(directory: Path, *_: object, **__: object) -> None:
        (directory / "optimizer.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shards", fail)
        with pytest.raises(RatelError, match="cannot be written: No space left"):
            saved(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == before
    saved(tmp_path, 2)
    names = [path.name for path in (tmp_path / "half").iterdir()]
    assert (len(names) > 2) == whole and ("optimizer.safetensors" in names) != whole
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    load_adamw_state(tmp_path / "half", model, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2}


def test_optimizers_that_are_refused(tmp_path: Path) -> None:
    path, model = saved(tmp_path), build("llama")

    def refused(match: str, optimizer: torch.optim.Optimizer, call: Callable = load_adamw_state) -> None:
        with pytest.raises(RatelError, match=match):
            call(tmp_path / "new" if call is save_adamw_state else path, model, optimizer)
        assert not (tmp_path / "new").exists()

    for call in (load_adamw_state, save_adamw_state):
        refused(r"is not torch.optim.AdamW \(given: SGD\)", torch.optim.SGD(model.parameters()), call)
        refused("is not torch.optim.AdamW", torch.optim.Adam(model.parameters()), call)
        refused(r"AdamW\(amsgrad=True\)", torch.optim.AdamW(model.parameters(), amsgrad=True), call)
        refused(r"parameter 1 of its group 0, \[96, 32\], is not in the model",
                torch.optim.AdamW([model.lm_head.weight, build("llama").lm_head.weight]), call)
    refused("no states before its first step", torch.optim.AdamW(model.parameters()), save_adamw_state)
    optimizer = torch.optim.AdamW(model.parameters())
    load_adamw_state(path, model, optimizer)
    optimizer.state[model.model.norm.weight]["step"] += 1
    refused("model.norm.weight was updated 5 times, model.embed_tokens.weight 4 times", optimizer, save_adamw_state)
    del optimizer.state[model.model.norm.weight]
    refused("model.norm.weight was updated 0 times", optimizer, save_adamw_state)


# --- files that do not fit ------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    file = path / "optimizer.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)
    return path


NORM = "exp_avg.model.norm.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "missing": (lambda t, _: t.pop(NORM), f"it lacks {NORM}"),
    "extra": (lambda t, _: t.update({"exp_avg.other": torch.zeros(2)}),
              "it has exp_avg.other, which is of no parameter"),
    "shape": (lambda t, _: t.update({NORM: torch.zeros(2)}), rf"{NORM} is \[2\], the model needs \[32\]"),
    "dtype": (lambda t, _: t.update({NORM: t[NORM].half()}), f"{NORM} is stored as F16"),
    "format": (lambda _, m: m.update(format="pt"), "does not say format ratel-adamw"),
    "version": (lambda _, m: m.update(version="2"), "version 2 of the format; this one reads up to 1"),
    "step": (lambda _, m: m.update(step="many"), "metadata is damaged: version '1', step 'many'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_refused(name: str, ssd_dir: Path, tmp_path: Path) -> None:
    """By both sides, before anything is reserved or changed."""
    change, message = WRONG[name]
    path = changed(saved(tmp_path), change)
    with pytest.raises(RatelError, match="^optimizer_state: .*" + message):
        open_decaying(build("llama"), "llama", ssd_dir, optimizer_state=path)
    assert list(ssd_dir.iterdir()) == []
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RatelError, match="^path: .*" + message):
        load_adamw_state(path, model, optimizer)
    assert not optimizer.state


def test_paths_that_are_refused(tmp_path: Path, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(RatelError, match=match):
            open_decaying(build("llama"), "llama", ssd_dir, optimizer_state=path)

    refused(tmp_path / "none", "is neither a file nor a directory")
    refused(tmp_path, "there is no optimizer.safetensors and no optimizer.safetensors.index.json")
    (tmp_path / "text.safetensors").write_text("not moments")
    refused(tmp_path / "text.safetensors", "optimizer_state: not a readable safetensors file")
    monkeypatch.setattr(shards, "SHARD_BYTES", 0)
    for steps in (1, 2):
        saved(tmp_path, steps, name=str(steps))
    parts = sorted(path.name for path in (tmp_path / "1").glob("*.safetensors"))
    refused(tmp_path / "1" / parts[0], "it lacks")
    (tmp_path / "2" / parts[0]).replace(tmp_path / "1" / parts[0])
    refused(tmp_path / "1" / "optimizer.safetensors.index.json", "was written after 1 steps, .* after 2")
    (tmp_path / "1" / parts[0]).unlink()
    refused(tmp_path / "1", "optimizer_state: a file that the index names is missing")


def test_other_frozen_parameters_are_refused(ssd_dir: Path, tmp_path: Path) -> None:
    path, model = saved(tmp_path), build("llama")
    freeze(model, "mlp")
    with pytest.raises(RatelError, match="it has exp_avg.model.layers.0.mlp.down_proj.weight, which is of no"):
        open_decaying(model, "llama", ssd_dir, optimizer_state=path)


def test_a_model_with_its_own_loss_is_refused_at_its_first_batch(ssd_dir: Path, tmp_path: Path) -> None:
    """Only then it is known what is trained; still before anything is reserved."""
    path = changed(saved(tmp_path, family="patches"), lambda tensors, _: tensors.pop("exp_avg_sq.norm.bias"))
    with open_decaying(build("patches"), "patches", ssd_dir, optimizer_state=path) as session:
        with pytest.raises(RatelError, match="it lacks exp_avg_sq.norm.bias"):
            session.step(batches("patches", 1)[0])
        assert list(ssd_dir.iterdir()) == []


def test_tied_weights_may_be_stored_under_any_name(ssd_dir: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.lm_head.weight"] = tensors.pop(f"{moment}.model.embed_tokens.weight")

    half = Plain("llama-tied").run("llama-tied", 0, HALF)
    path = changed(save_adamw_state(tmp_path / "half", half.model, half.optimizer), rename)
    found = Plain("llama-tied")
    load_adamw_state(path, found.model, found.optimizer)
    tied = found.optimizer.state[found.model.lm_head.weight]
    assert torch.equal(tied["exp_avg"], half.optimizer.state[half.model.lm_head.weight]["exp_avg"])
    with open_decaying(half.model, "llama-tied", ssd_dir, optimizer_state=path) as session:
        session.prepare(ROWS, 16)
        name = "m.model.embed_tokens.weight"
        assert torch.equal(everything(session)[name], half.everything()[name])


def test_reachable_from_the_package() -> None:
    assert ratel.load_adamw_state is adamw.load_adamw_state and ratel.save_adamw_state is adamw.save_adamw_state
