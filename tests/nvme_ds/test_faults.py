"""What goes wrong: errors with their place, full and unsuitable directories, no O_DIRECT, no
io_uring, no compiler."""

import errno
import fcntl
import logging
import mmap
import os
from contextlib import suppress
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, BuildError, Engine, IoError, NoSpaceError, build, files, native
from nvme_ds.errors import DirectError
from tests.support.engines import KIB, MIB
from tests.tools.interrupting import Tracer, interrupt, moments

pytestmark = pytest.mark.native


def test_an_error_names_file_offset_and_cause(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, request_bytes=64 * KIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(fail_op="write", fail_after_n=3, errno=errno.ENOSPC)
        ticket = engine.submit_write(volume, 0, memory.address, MIB, 0)
        with pytest.raises(IoError) as caught:
            engine.wait(ticket)
        error = caught.value
        assert (error.errno, error.filename, error.op) == (errno.ENOSPC, volume.paths[0], "write")
        assert (error.offset, error.num_bytes) == (3 * 64 * KIB, 64 * KIB)
        stats = engine.stats()
        assert stats["errors"] == 1 and stats["writes"] == 15, "the other parts were not finished"
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB, 0))


def test_the_first_error_of_a_ticket_wins(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, request_bytes=64 * KIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(fail_op="any", fail_after_n=2, fail_count=5)
        with pytest.raises(IoError) as caught:
            engine.wait(engine.submit_read(volume, 0, memory.address, MIB, 0))
        assert caught.value.offset == 2 * 64 * KIB and engine.stats()["errors"] == 5


def test_wait_all_waits_for_all_and_raises_the_first(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(fail_op="read", fail_after_n=1, errno=errno.EIO, max_delay_us=5000)
        tickets = [engine.submit_read(volume, at, memory.address + at, 64 * KIB, 0) for at in range(0, MIB, 64 * KIB)]
        with pytest.raises(IoError):
            engine.wait_all(tickets)
        assert engine.stats()["tickets"] == 0


def test_interrupted_operations_are_repeated(backend: str, ssd_dir: Path) -> None:
    data = os.urandom(MIB)
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(2 * MIB)
        memory.view[:MIB] = data
        for code, op in ((errno.EINTR, "write"), (errno.EAGAIN, "read")):
            engine.inject(fail_op=op, fail_after_n=2, fail_count=5, errno=code, short_transfers=True)
            submit = engine.submit_write if op == "write" else engine.submit_read
            engine.wait(submit(volume, 0, memory.address + (op == "read") * MIB, MIB, 0))
        assert memory.view[MIB:] == data
        assert engine.stats()["errors"] == 0


def test_a_truncated_file_is_an_error_not_a_hang(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        os.truncate(volume.paths[0], MIB - 32 * KIB)
        with pytest.raises(IoError) as caught:
            engine.wait(engine.submit_read(volume, 0, memory.address, MIB, 0))
        error = caught.value
        assert (error.errno, error.offset, error.num_bytes) == (errno.ENODATA, MIB - 32 * KIB, 32 * KIB)


def test_a_failed_sync_is_reported(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend) as engine:
        volume = engine.create_volume([ssd_dir], "v", MIB)
        engine.inject(fail_op="sync", errno=errno.EIO)
        with pytest.raises(IoError, match="sync failed") as caught:
            volume.sync()
        error = caught.value
        assert (error.errno, error.filename, error.op, error.offset) == (errno.EIO, volume.paths[0], "sync", 0)
        volume.sync()
        stats = engine.stats()
        assert (stats["reads"], stats["writes"], stats["errors"]) == (0, 0, 1)


def test_a_sync_reaches_every_file_whatever_the_others_answer(backend: str, ssd_dir: Path) -> None:
    folders = [ssd_dir / str(index) for index in range(3)]
    for folder in folders:
        folder.mkdir()
    with Engine(backend=backend) as engine:
        volume = engine.create_volume(folders, "v", 3 * MIB)
        for num_failing in (1, 2, 3):
            engine.reset_stats()
            engine.inject(fail_op="sync", fail_count=num_failing, errno=errno.ENOSPC)
            with pytest.raises(IoError) as caught:
                volume.sync()
            assert caught.value.errno == errno.ENOSPC and caught.value.filename in volume.paths
            assert engine.stats()["errors"] == num_failing, "the hook is used up: all three were asked"
        volume.sync()


def test_an_interrupted_sync_is_repeated_and_a_closed_volume_refuses(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend) as engine:
        volume = engine.create_volume([ssd_dir], "v", MIB)
        for code in (errno.EINTR, errno.EAGAIN):
            engine.inject(fail_op="sync", fail_count=3, errno=code)
            volume.sync()
        assert engine.stats()["errors"] == 0
        volume.close()
        with pytest.raises(ValueError, match="is closed"):
            volume.sync()


def test_a_full_disk_is_found_at_creation(ssd_dir: Path) -> None:
    stat = os.statvfs(ssd_dir)
    free_bytes = stat.f_bavail * stat.f_frsize
    with Engine() as engine, pytest.raises(NoSpaceError) as caught:
        engine.create_volume([ssd_dir], "v", free_bytes + (1 << 30))
    error = caught.value
    assert error.errno == errno.ENOSPC and error.directory == str(ssd_dir)
    assert error.needed_bytes == free_bytes + (1 << 30) and error.free_bytes < error.needed_bytes
    assert os.listdir(ssd_dir) == []


def test_an_allocation_that_fails_leaves_nothing(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ssd_dir / "a").mkdir(), (ssd_dir / "b").mkdir()
    real = os.posix_fallocate

    def allocate(fd: int, offset: int, num_bytes: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(ssd_dir / "b")):
            raise OSError(errno.ENOSPC, "full")
        real(fd, offset, num_bytes)

    monkeypatch.setattr(files.os, "posix_fallocate", allocate)
    with Engine() as engine, pytest.raises(NoSpaceError) as caught:
        engine.create_volume([ssd_dir / "a", ssd_dir / "b"], "v", 4 * MIB)
    assert caught.value.directory == str(ssd_dir / "b")
    assert os.listdir(ssd_dir / "a") == os.listdir(ssd_dir / "b") == []


def test_unusable_directories(ssd_dir: Path) -> None:
    (ssd_dir / "file").touch()
    locked = ssd_dir / "locked"
    locked.mkdir(mode=0o555)
    unwritable = str(locked) if os.geteuid() else "/sys"  # root may write anywhere but into sysfs
    with Engine() as engine:
        for folder in (str(ssd_dir / "missing"), str(ssd_dir / "file"), unwritable):
            with pytest.raises(OSError) as caught:
                engine.create_volume([folder], "v", MIB)
            assert caught.value.filename == os.path.join(folder, "v.0")


def test_without_o_direct(backend: str, ssd_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(backend=backend) as engine:
        engine.inject(no_direct=True)
        with pytest.raises(OSError, match="no O_DIRECT"):
            engine.create_volume([ssd_dir], "v", MIB, direct="on")
        assert os.listdir(ssd_dir) == []
        with caplog.at_level(logging.WARNING, logger="nvme_ds"):
            volume = engine.create_volume([ssd_dir], "v", MIB, direct="auto")
        assert not volume.direct and len(caplog.records) == 1
        memory = AlignedBuffer(2 * MIB)
        memory.view[:MIB] = os.urandom(MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB, 0))
        engine.wait(engine.submit_read(volume, 0, memory.address + MIB, MIB, 0))
        assert memory.view[:MIB] == memory.view[MIB:]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_o_direct_that_is_accepted_and_then_refused(backend: str, ssd_dir: Path, caplog: pytest.LogCaptureFixture,
                                                    refusal: int) -> None:
    """Some network and FUSE file systems do this. Other transfers may be under way, and are
    repeated as well."""
    folders = [ssd_dir / "a", ssd_dir / "b"]
    for folder in folders:
        folder.mkdir()
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        volume, memory = engine.create_volume(folders, "v", MIB, stripe_bytes=64 * KIB), AlignedBuffer(2 * MIB)
        if not volume.direct:
            pytest.skip("this file system has no O_DIRECT that could be refused")
        memory.view[:MIB] = os.urandom(MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB // 2, 0))
        engine.inject(direct_errno=refusal, max_delay_us=1000)
        with caplog.at_level(logging.WARNING, logger="nvme_ds"):
            engine.wait_all([engine.submit_write(volume, at, memory.address + at, MIB // 4, 0) for at in (MIB // 2, 3 * MIB // 4)])
            engine.wait(engine.submit_read(volume, 0, memory.address + MIB, MIB, 0))
        assert not volume.direct and memory.view[:MIB] == memory.view[MIB:]
        assert engine.stats()["errors"] == 0
        assert [record.message for record in caplog.records if "using the page cache" in record.message] == [
            record.message for record in caplog.records] and len(caplog.records) == 1
        for fd in os.listdir("/proc/self/fd"):
            if _target(fd) in volume.paths:
                assert not fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_DIRECT


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_o_direct_that_must_be_is_not_left(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend) as engine:
        try:
            volume, memory = engine.create_volume([ssd_dir], "v", MIB, direct="on"), AlignedBuffer(MIB)
        except OSError:
            pytest.skip("this file system has no O_DIRECT that could be refused")
        engine.inject(direct_errno=errno.EINVAL)
        with pytest.raises(DirectError, match="takes O_DIRECT and then refuses it: use direct='auto'") as caught:
            engine.wait(engine.submit_write(volume, 0, memory.address, MIB, 0))
        assert caught.value.filename == volume.paths[0] and volume.direct


def test_memory_that_cannot_be_registered_still_works(ssd_dir: Path) -> None:
    import ctypes

    with open(ssd_dir / "backing", "w+b") as backing, Engine() as engine:
        backing.truncate(MIB)
        with mmap.mmap(backing.fileno(), MIB) as mapped:  # file-backed memory: io_uring refuses to fix it
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            engine.register_buffer(address, MIB)
            volume = engine.create_volume([ssd_dir], "v", MIB)
            assert engine.stats()["fixed_buffers"].startswith("off: ")
            engine.wait(engine.submit_read(volume, 0, address, MIB, 0))
            engine.unregister_buffer(address)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native.library(), "uring_probe", lambda depth: -errno.EPERM)
    with pytest.raises(OSError, match="io_uring is not available") as caught:
        Engine(backend="io_uring")
    assert caught.value.errno == errno.EPERM
    with Engine(backend="auto") as engine:
        assert engine.backend == engine.stats()["backend"] == "threads"
    assert "using threads" in caplog.text


@pytest.mark.parametrize("options", [
    {"backend": "aio"}, {"queue_depth": 0}, {"num_threads": 0}, {"request_bytes": 1000}, {"bandwidth_bps": -1.0},
    {"stall_timeout_s": 0.0}, {"stall_timeout_s": float("inf")}, {"stall_timeout_s": float("nan")},
])
def test_engine_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(**options)


def test_arguments_are_checked(ssd_dir: Path) -> None:
    with Engine() as engine:
        for field, wrong in {"directories": [ssd_dir, ssd_dir], "name": "a/b", "num_bytes": 0, "stripe_bytes": 1000,
                             "weights": [1, 2], "direct": "yes"}.items():
            with pytest.raises(ValueError, match=field):
                engine.create_volume(**({"directories": [ssd_dir], "name": "v", "num_bytes": MIB} | {field: wrong}))
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        for offset, address, num_bytes, priority in [(1, 0, 4096, 0), (0, 8, 4096, 0), (0, 0, 100, 0), (0, 0, 4096, 5),
                                                     (MIB, 0, 4096, 0)]:
            with pytest.raises(ValueError, match="multiples|past the end"):
                engine.submit_read(volume, offset, memory.address + address, num_bytes, priority)
        volume.close()
        with pytest.raises(ValueError, match="closed"):
            engine.submit_read(volume, 0, memory.address, 4096, 0)


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVME_DS_LIBRARY", str(tmp_path / "none.so"))
    native.library.cache_clear()
    try:
        with pytest.raises(ImportError, match="python -m nvme_ds.build"):
            Engine()
    finally:
        native.library.cache_clear()


def test_a_missing_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"g\+\+.*build-essential"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_removes_before_its_lock_is_not_used(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        os.unlink(ssd_dir / "v.0")
        lock(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with Engine() as engine, pytest.raises(OSError, match="another process has just removed the file") as caught:
        engine.create_volume([ssd_dir], "v", MIB)
    assert caught.value.errno == errno.EBUSY and list(ssd_dir.iterdir()) == []


def test_an_exception_at_any_line_of_making_a_volume_leaves_nothing_in_use(ssd_dir: Path) -> None:
    """As an exception of a signal may come in a program that does not defer them: the name is free
    for the next engine."""
    def attempt(tracer: Tracer) -> None:
        with Engine() as engine, suppress(KeyboardInterrupt):
            tracer.run(lambda: engine.create_volume([ssd_dir], "v", MIB))

    whole = Tracer()
    attempt(whole)
    tried = moments(whole.hits)
    for moment in tried:
        attempt(Tracer(moment, interrupt))
        for left in ssd_dir.iterdir():  # the engine had it already and there was no volume yet: it is known by its stamp later
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    assert len(tried) > 100
