"""What Ratel believes about a machine: limits of control groups, devices, directories."""

import os
from pathlib import Path

import pytest
import torch

from ratel.errors import RatelError
from ratel.hardware import limits
from ratel.hardware.device import choose_dtype, require_device, why_no_cuda
from ratel.hardware.doctor import advise, render
from ratel.hardware.host import available_memory, describe_host, usable_cores
from ratel.hardware.storage import describe_directory, require_directory, supports_direct
from ratel.units import GIB, MIB

pytestmark = pytest.mark.unit


def groups(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree like /sys/fs/cgroup, and a file like /proc/self/cgroup."""
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(text)
    (root / "cgroup").write_text(membership)
    return root / "fs", root / "cgroup"


def test_the_tightest_group_above_limits_memory(tmp_path: Path) -> None:
    where = groups(tmp_path, "0::/job/step\n", {
        "job/memory.max": str(8 * GIB), "job/memory.current": str(5 * GIB),
        "job/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
        "job/step/memory.max": "max\n", "job/step/memory.current": str(GIB),
    })
    assert limits.memory_limit(*where) == 8 * GIB
    assert limits.memory_headroom(*where) == 5 * GIB  # 8 - (5 - 2 that the page cache gives back)


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    where = groups(tmp_path, "0::/docker/4f2a\n", {"memory.max": str(GIB), "memory.current": "0",
                                                   "cpu.max": "150000 100000"})
    assert limits.memory_limit(*where) == GIB and limits.cpu_quota(*where) == 1.5


def test_version_1_groups(tmp_path: Path) -> None:
    where = groups(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/\n", {
        "memory/job/memory.limit_in_bytes": str(2 * GIB), "memory/job/memory.usage_in_bytes": str(GIB),
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
    })
    assert limits.memory_limit(*where) == 2 * GIB and limits.memory_headroom(*where) == GIB
    assert limits.cpu_quota(*where) is None


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    where = groups(tmp_path, "", {})
    assert limits.memory_limit(*where) is None and limits.memory_headroom(*where) is None


def test_an_exhausted_group_leaves_nothing(tmp_path: Path) -> None:
    where = groups(tmp_path, "0::/\n", {"memory.max": str(GIB), "memory.current": str(GIB + MIB)})
    assert limits.memory_headroom(*where) == 0


def test_this_machine_is_described() -> None:
    host = describe_host()
    assert 1 <= host["cpu"]["cores"] == usable_cores() <= os.cpu_count()
    assert 0 < available_memory() <= host["memory"]["total_bytes"]
    assert torch.__version__.startswith(host["packages"]["torch"])  # which may leave out what it was built for


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent_is_refused_with_the_reason() -> None:
    with pytest.raises(RatelError, match="--device: there is no CUDA device: this PyTorch .*given: cuda.*--device cpu"):
        require_device("cuda")
    assert require_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("isa", "expected"), [(["avx2", "avx512f"], "fp32"), (["avx512_bf16"], "bf16"), ([], "fp32")])
def test_the_processor_computes_in_what_it_is_fast_in(monkeypatch: pytest.MonkeyPatch, isa: list[str],
                                                      expected: str) -> None:
    monkeypatch.setattr("ratel.hardware.device.describe_cpu", lambda: {"isa": isa})
    assert choose_dtype(torch.device("cpu")) == expected and choose_dtype(torch.device("cuda")) == "bf16"


@pytest.mark.gpu
def test_cuda_is_found() -> None:
    assert require_device("auto").type == "cuda" and require_device("cuda:0").index == 0 and why_no_cuda() is None
    with pytest.raises(RatelError, match="counted from 0"):
        require_device("cuda:99")


@pytest.mark.parametrize("device", ["tpu!", "meta"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(RatelError, match="--device.*Use auto, cuda or cpu"):
        require_device(device)


def test_a_directory_is_described_and_left_empty(ssd_dir: Path) -> None:
    facts = describe_directory(str(ssd_dir / "new"))
    assert facts["free_bytes"] > 0 and facts["file_system"] != "unknown"
    assert list((ssd_dir / "new").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RatelError, match="--ssd: cannot be written to: .*(exists|Not a directory)"):
        require_directory(str(tmp_path / "file"))
    with pytest.raises(RatelError, match="--ssd: cannot be written to"):
        require_directory("/proc/ratel")


def test_a_file_system_without_direct_io_is_recognised(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse_direct(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_direct)
    assert not supports_direct(ssd_dir)
    assert list(ssd_dir.iterdir()) == []


def report(**changes: object) -> dict:
    host = describe_host()
    host["memory"]["memlock_bytes"] = None
    return {"host": host, "cuda": {"torch_cuda": "13.0", "devices": [], "missing": None},
            "native": {"adamw_isa": "avx2", "io_uring": True, "io_uring_problem": None}, "ssd": [], **changes}


def test_advice_names_what_is_wrong_and_nothing_else() -> None:
    assert list(advise(report())) == []
    without_native = report(native={"error": "no library"})
    assert any("install g++" in line for line in advise(without_native))
    forbidden = report(native={"adamw_isa": "avx2", "io_uring": False, "io_uring_problem": "not permitted"})
    assert any("io_uring is not available (not permitted)" in line for line in advise(forbidden))
    entry = {"path": "/mnt/a", "device": "d", "file_system": "tmpfs", "free_bytes": 1, "direct": False}
    assert any("/mnt/a (tmpfs) has no O_DIRECT" in line for line in advise(report(ssd=[entry])))


def test_a_report_without_native_code_can_be_shown() -> None:
    broken = report(native={"error": "no library"})
    broken["advice"] = list(advise(broken))
    assert "native code" in render(broken) and "note: The native libraries are not built" in render(broken)
