"""Volumes in the words of a session's options: which field is at fault, and what would help."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ratel import native
from ratel.errors import RatelError
from ratel.store.volumes import IoOptions, create_volume, open_engine, pattern_of, reopen_volume

pytestmark = pytest.mark.native


def refusing(error: OSError) -> Any:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return SimpleNamespace(create_volume=refuse, open_volume=refuse)


def test_a_volume_without_bytes_is_none_and_one_with_some_has_them(ssd_dir: Path) -> None:
    io = IoOptions(directories=(str(ssd_dir),))
    assert create_volume(refusing(OSError()), "states", 0, io) is None
    with open_engine(io) as engine:
        volume = create_volume(engine, "states", 4096, io)
        assert volume.num_bytes == 4096 and [Path(path).parent for path in volume.paths] == [ssd_dir]


@pytest.mark.parametrize(("number", "direct", "field", "words"), [
    (errno.EEXIST, "auto", "ssd", "Remove it, or give other directories"), (errno.ELOOP, "auto", "ssd", "Remove it"),
    (errno.EINVAL, "on", "direct", "Use --direct auto"), (errno.EINVAL, "auto", "ssd", "no place for 4096 bytes of states"),
    (errno.EBUSY, "on", "ssd", "another run has its states there"), (errno.ENOSPC, "on", "ssd", "no place for 4096 bytes of states")])
def test_each_refusal_names_its_option(number: int, direct: str, field: str, words: str, tmp_path: Path) -> None:
    io = IoOptions(directories=(str(tmp_path),), direct=direct)
    with pytest.raises(RatelError) as caught:
        create_volume(refusing(OSError(number, "why", str(tmp_path / "states.0"))), "states", 4096, io)
    assert caught.value.field == field and words in str(caught.value)


def test_a_state_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(RatelError, match="state: cannot be opened: .*states.0") as caught:
        reopen_volume(refusing(OSError(errno.EBUSY, "busy")), [tmp_path / "states.0"], 4096, IoOptions())
    assert caught.value.field == "state"


def test_what_was_made_is_opened_again(ssd_dir: Path) -> None:
    """Behind its bytes a file carries its stamp."""
    io = IoOptions(directories=(str(ssd_dir),))
    with open_engine(io) as engine:
        volume = engine.create_volume([str(ssd_dir)], "states", 8192, keep=True, tail=lambda index: bytes(4096))
        files = [Path(path) for path in volume.paths]
    assert files[0].stat().st_size == 8192 + 4096
    with open_engine(io) as engine:
        again = reopen_volume(engine, files, 8192, io)
        assert again.num_bytes == 8192 and [Path(path) for path in again.paths] == files


def test_an_engine_that_does_not_start_is_the_backends_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.ENOSYS, "no io_uring here")

    monkeypatch.setattr(native.nvme_ds, "Engine", refuse)
    with pytest.raises(RatelError, match="io_backend: the I/O engine cannot start: .*no io_uring here.*given: io_uring"):
        open_engine(IoOptions(backend="io_uring"))


def test_the_pattern_is_of_the_stripes_or_one_for_each_directory() -> None:
    assert pattern_of(IoOptions(directories=("a", "b"))) == [0, 1]
    assert sorted(pattern_of(IoOptions(directories=("a", "b"), stripes=(3, 1)))) == [0, 0, 0, 1]
