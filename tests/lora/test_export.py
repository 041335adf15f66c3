"""The directory of an adapter: whole or the older one, whatever ends the writing, and nothing of
somebody else's is lost."""

import errno
import os
from pathlib import Path

import pytest
import torch

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.targets import resolve
from ratel.lora.files import read_adapter, write_adapter
from ratel.ownership import exports
from ratel.runtime.states.export import export_directory
from tests.support.lora import make, trained

pytestmark = pytest.mark.unit
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def export(path: Path, rank: int) -> None:
    targets = resolve(LoraConfig(rank=rank), outline_of(make("llama")))
    export_directory(path, "the adapter", lambda directory: write_adapter(directory, targets, trained(targets)))


def rank_in(path: Path) -> int:
    return read_adapter(path, outline_of(make("llama"))).config.rank


def test_an_adapter_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "out" / "adapter"
    export(path, 4)
    (path / "notes.txt").write_text("mine")
    export(path, 3)
    assert rank_in(path) == 3 and sorted(os.listdir(path)) == sorted([*FILES, "notes.txt"])
    assert os.listdir(path.parent) == ["adapter"]


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    path = tmp_path / "adapter"
    export(path, 4)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ratel.lora.files.write_synced" if file == FILES[0] else "ratel.lora.files.write_shards",
                        full if file == FILES[0] else lambda *_, **__: full())
    with pytest.raises(RatelError, match="the adapter cannot be written: .*No space left"):
        export(path, 3)
    assert rank_in(path) == 4 and os.listdir(tmp_path) == ["adapter"]


def test_a_kill_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter"
    export(path, 4)
    with monkeypatch.context() as patch:
        patch.setattr("ratel.runtime.states.export.replace_directory", lambda *_, **__: os._exit(0))
        child = os.fork()
        if not child:
            export(path, 3)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert rank_in(path) == 4 and len(os.listdir(tmp_path)) == 2
    export(path, 2)
    assert rank_in(path) == 2 and os.listdir(tmp_path) == ["adapter"]


def test_somebody_elses_adapter_stays(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    before = {name: (tmp_path / "adapter" / name).read_bytes() for name in os.listdir(tmp_path / "adapter")}
    with pytest.raises(RatelError, match="holds adapter_config.json, which no export has written"):
        export(tmp_path / "adapter", 3)
    assert {name: (tmp_path / "adapter" / name).read_bytes() for name in os.listdir(tmp_path / "adapter")} == before


def test_a_description_that_was_changed_is_somebodys(tmp_path: Path) -> None:
    export(tmp_path / "adapter", 4)
    assert exports.own_files(tmp_path / "adapter") == set(FILES)
    config = tmp_path / "adapter" / FILES[0]
    config.write_text(config.read_text().replace('"r": 4', '"r": 4, "revision": "mine"'))
    with pytest.raises(RatelError, match="was changed since"):
        export(tmp_path / "adapter", 3)


def test_what_is_written_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{d}"))), fsync(d))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {os.path.basename(b)}"), rename(a, b))[1])
    export(tmp_path / "adapter", 4)
    named = events.index("rename adapter")
    assert {f"sync {name}" for name in (*FILES, "adapter.partial")} <= set(events[:named])
    assert f"sync {tmp_path.name}" in events[named:]
    assert torch.is_tensor(next(iter(read_adapter(tmp_path / "adapter", outline_of(make("llama"))).tensors.values())))
