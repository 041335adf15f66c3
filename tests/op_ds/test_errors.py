"""What op_ds refuses: bad arguments before anything is touched, impossible choices, a missing or
foreign library."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import op_ds
from op_ds import build, library
from tests.support.patience import patience
from tests.tools.interrupting import Tracer, interrupt, moments

pytestmark = pytest.mark.native

ADAM = dict(grad_dtype="fp32", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, step=1, ranges=[(8, 0.0)])


def update(pool: op_ds.Pool, n: int = 8, **changes: object) -> torch.Tensor:
    planes = [torch.zeros(8) for _ in range(5)]
    pool.adamw(*(p.data_ptr() for p in planes), n, **{**ADAM, **changes})
    return planes[2]


@pytest.mark.parametrize(("changes", "message"), [
    ({"n": -1}, "n must not be negative"),
    ({"step": 0}, "step counts from 1"),
    ({"step": 1.5}, "step counts from 1"),
    ({"grad_dtype": "fp16"}, "dtype must be one of bf16, fp32"),
    ({"beta1": 1.0}, "beta1 must be in"),
    ({"beta2": -0.1}, "beta2 must be in"),
    ({"lr": float("nan")}, "lr must be finite"),
    ({"eps": -1e-8}, "eps must be finite"),
    ({"ranges": []}, "must cover all 8 elements"),
    ({"ranges": [(7, 0.0)]}, "must cover all 8 elements"),
    ({"ranges": [(9, 0.0)]}, "must cover all 8 elements"),
    ({"ranges": [(6, 0.0), (5, 0.0), (8, 0.0)]}, "must not decrease"),
    ({"ranges": [(8, -0.1)]}, "weight decay must be finite"),
])
def test_bad_update_arguments(changes: dict[str, object], message: str) -> None:
    with op_ds.Pool(1) as pool:
        with pytest.raises(ValueError, match=message):
            update(pool, **changes)


def test_other_bad_arguments() -> None:
    with op_ds.Pool(1) as pool:
        for call in (lambda: pool.split(0, 0, 0, -1), lambda: pool.merge(0, 0, 0, -1), lambda: pool.touch(0, -1),
                     lambda: pool.fill(0, -1), lambda: pool.copy(0, 0, -1), lambda: pool.sum_squares(0, -1, "fp32")):
            with pytest.raises(ValueError, match="must not be negative"):
                call()
        with pytest.raises(ValueError, match="dtype must be one of"):
            pool.sum_squares(0, 0, "float")
        with pytest.raises(ValueError, match="byte must be in"):
            pool.fill(0, 0, 256)
        with pytest.raises(ValueError, match="must not overlap"):
            pool.copy(1000, 900, 101)
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        op_ds.Pool(0)


def test_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATEL_ISA", "scalar")
    assert op_ds.Pool(1).isa == "scalar"
    monkeypatch.setenv("RATEL_ISA", "sse9")
    with pytest.raises(ValueError, match="RATEL_ISA must be one of"):
        op_ds.Pool(1)
    assert op_ds.Pool(1, isa="scalar").isa == "scalar"
    monkeypatch.delenv("RATEL_ISA")
    with pytest.raises(ValueError, match="isa must be one of"):
        op_ds.Pool(1, isa="neon")


def test_a_forced_isa_that_is_missing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def op_ds_pool_create(self, *_: object) -> int:
            return -95  # ENOTSUP, as find_kernels answers on a processor without the instructions

    monkeypatch.setattr("op_ds.pool.load", Refusing)
    with pytest.raises(op_ds.UnsupportedIsaError, match="cannot run the forced instruction set 'avx512'"):
        op_ds.Pool(1, isa="avx512")


def test_auto_takes_the_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATEL_ISA", raising=False)
    flags = Path("/proc/cpuinfo").read_text().split() if os.path.exists("/proc/cpuinfo") else []
    wanted = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags and "fma" in flags else "scalar"
    with op_ds.Pool(1) as pool:
        assert pool.isa == wanted


def num_os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_threads_are_the_callers_plus_workers_and_end_with_close() -> None:
    before = num_os_threads()
    with op_ds.Pool(1):
        assert num_os_threads() == before
    with op_ds.Pool(4):
        assert num_os_threads() == before + 3
    assert num_os_threads() == before


def test_closed_pool() -> None:
    pool = op_ds.Pool(2)
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="the pool is closed"):
        update(pool)


def test_close_waits_for_calls_in_flight() -> None:
    pool, x = op_ds.Pool(2), torch.ones(2_000_000)
    outcomes: list[object] = []

    def work() -> None:
        try:
            for _ in range(50):
                outcomes.append(pool.sum_squares(x.data_ptr(), len(x), "fp32"))
        except RuntimeError as error:
            outcomes.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not outcomes:
        pass
    pool.close()
    thread.join()
    assert all(o in ((2e6, 0), "the pool is closed") for o in outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told() -> None:
    code = ("import op_ds, os, sys\npool = op_ds.Pool(2)\nchild = os.fork()\nif child == 0:\n"
            "  try:\n    pool.fill(0, 0)\n  except RuntimeError as error:\n"
            "    os._exit(7 if 'fork' in str(error) else 8)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))")
    assert subprocess.run([sys.executable, "-c", code], timeout=patience(60), cwd=Path(op_ds.__file__).parents[1]).returncode == 7


def test_missing_library_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(op_ds.LibraryError, match="is missing. Build it with: python -m op_ds.build"):
        library.load(tmp_path / "libop_ds.so")
    (tmp_path / "libop_ds.so").write_bytes(b"not a library")
    with pytest.raises(op_ds.LibraryError, match="cannot be loaded.*python -m op_ds.build"):
        library.load(tmp_path / "libop_ds.so")


def test_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    with pytest.raises(op_ds.LibraryError, match="this package needs 999"):
        library._open(library.LIBRARY_PATH)


def test_missing_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="Install the package g\\+\\+"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="'no-such-compiler' named by CXX"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failing_compiler_shows_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho the disk is full >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="failed with status 3:\nthe disk is full"):
        build.build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_op_ds_stands_alone() -> None:
    code = ("import sys, op_ds, op_ds.build; op_ds.Pool(1); "
            "print([m for m in ('torch', 'ratel', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(60),
                          cwd=Path(op_ds.__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stderr


def test_a_pool_closes_after_an_exception_at_any_line_of_a_call() -> None:
    """As an exception of a signal may come in a program that does not defer them."""
    def attempt(tracer: Tracer) -> None:
        with op_ds.Pool(2) as pool, suppress(KeyboardInterrupt):
            tracer.run(lambda: update(pool))

    whole = Tracer()
    attempt(whole)
    for moment in moments(whole.hits):
        attempt(Tracer(moment, interrupt))
    assert len(whole.hits) > 20
