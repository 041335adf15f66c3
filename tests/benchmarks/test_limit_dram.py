"""Taking memory away for an experiment, and giving it back whatever happens to whom. See
benchmarks/size/limit_dram.py.

Most tests use a directory that looks like the root of a machine with two NUMA nodes; the last ones
take a little of the real memory where that is permitted.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness.machine_memory import Cgroup, Machine, remove_group, reserve_pages
from benchmarks.size import limit_dram as dram
from ratel.errors import RatelError
from ratel.units import GIB, KIB, MIB
from tests.support.limits import taken_away
from tests.support.patience import wait_until

ROOT = Path(__file__).resolve().parents[2]
PAGE = 2 * MIB
TRUE = [sys.executable, "-c", ""]


def plant(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """4 GiB available, three quarters of it on node 0; 5 huge pages are there already."""
    plant(tmp_path, "proc/meminfo", f"MemAvailable: {4 * GIB // KIB} kB\nHugepagesize: 2048 kB\nHugePages_Total: 5\n")
    plant(tmp_path, "proc/sys/kernel/random/boot_id", "this boot\n")
    plant(tmp_path, "proc/sys/vm/drop_caches", "0")
    (tmp_path / "run").mkdir()
    for node, free, pages in ((0, 2 * GIB, 5), (1, GIB, 0)):
        folder = f"sys/devices/system/node/node{node}"
        cache = GIB if node == 0 else 0
        plant(tmp_path, f"{folder}/meminfo",
              f"Node {node} MemFree: {free // KIB} kB\nNode {node} FilePages: {cache // KIB} kB\n"
              f"Node {node} HugePages_Total: 0\n")
        plant(tmp_path, f"{folder}/hugepages/hugepages-2048kB/nr_hugepages", f"{pages}\n")
    return Machine(root=tmp_path)


def counts(machine: Machine) -> list[int]:
    return [int(path.read_text() or -1) for path in machine.counters()]  # a file is empty while it is written


# --- a machine of files ---------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_each_node_gives_by_what_it_has_and_gets_it_back(machine: Machine) -> None:
    with dram.limit_dram(2 * GIB, machine=machine) as limit:
        assert limit.taken_bytes == 2 * GIB and limit.enter(["x"]) == ["x"]
        assert counts(machine) == [5 + 768, 256]  # 1024 pages as 3 to 1
        assert machine.state_file("huge-pages").parent == machine.root / "run"
    assert counts(machine) == [5, 0] and not machine.state_file("huge-pages").exists()


@pytest.mark.unit
def test_a_kernel_without_nodes_has_one_counter(tmp_path: Path) -> None:
    plant(tmp_path, "proc/meminfo", f"MemAvailable: {4 * GIB // KIB} kB\nHugepagesize: 2048 kB\n")
    plant(tmp_path, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0")
    machine = Machine(root=tmp_path)
    assert reserve_pages(machine, GIB) == GIB and counts(machine) == [512]


@dataclass(frozen=True, kw_only=True)
class Tight(Machine):
    """A kernel that finds at most ``most`` pages on node 0, and more after it was asked to make
    room."""

    most: int = 100
    after_room: int = 100

    def set_count(self, counter: Path, pages: int) -> None:
        asked = (self.root / "proc/sys/vm/drop_caches").read_text() == "1"
        bound = (self.after_room if asked else self.most) if "node0" in str(counter) else 10_000
        super().set_count(counter, min(pages, bound))


@pytest.mark.unit
def test_what_one_node_cannot_give_others_do(machine: Machine) -> None:
    tight = Tight(root=machine.root, most=100)
    with dram.limit_dram(2 * GIB, machine=tight) as limit:
        assert sum(counts(tight)) - 5 == 1024 and counts(tight)[0] == 100
        assert limit.taken_bytes == 2 * GIB
    assert counts(tight) == [5, 0]


@pytest.mark.unit
def test_room_is_made_when_the_kernel_finds_no_pages(machine: Machine) -> None:
    (second,) = machine.counters()[1:]
    second.parents[2].rename(machine.root / "gone")  # one node
    assert reserve_pages(Tight(root=machine.root, most=5, after_room=1000), 100 * PAGE) == 100 * PAGE


@pytest.mark.unit
def test_memory_that_cannot_be_had_is_refused_and_given_back(machine: Machine) -> None:
    machine.counters()[1].parents[2].rename(machine.root / "gone")
    with pytest.raises(RatelError, match="kernel gave 190.00 MiB of 2.00 GiB in huge pages.*choose another --method"):
        with dram.limit_dram(2 * GIB, machine=Tight(root=machine.root)):
            pytest.fail("the limit was not reached")
    assert counts(machine) == [5] and not machine.state_file("huge-pages").exists()


@pytest.mark.unit
def test_nothing_is_chosen_in_place_of_huge_pages(machine: Machine) -> None:
    for counter in machine.counters():
        counter.unlink()
    with pytest.raises(RatelError, match="huge pages cannot be reserved here: .*choose --method cgroup or mlock"):
        with dram.limit_dram(2 * GIB, machine=machine):
            pass
    assert not machine.state_file("huge-pages").exists()


@pytest.mark.unit
@pytest.mark.parametrize("limit", [5 * GIB, 4 * GIB, MIB])
def test_limits_out_of_reach_are_refused(machine: Machine, limit: int) -> None:
    with pytest.raises(RatelError, match="must be between 256.00 MiB and the 4.00 GiB that are available"):
        with dram.limit_dram(limit, machine=machine):
            pass


@pytest.mark.unit
def test_an_error_in_the_block_gives_back_and_passes(machine: Machine) -> None:
    with pytest.raises(KeyError):
        with dram.limit_dram(2 * GIB, machine=machine):
            raise KeyError
    assert counts(machine) == [5, 0]


@pytest.mark.unit
def test_the_status_of_the_command_is_passed_on(machine: Machine) -> None:
    for code, status in (("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        assert dram.run([sys.executable, "-c", code], 2 * GIB, "huge-pages", machine) == status
    assert counts(machine) == [5, 0]


# --- killed ---------------------------------------------------------------------------------------------------------


def start(machine: Machine, method: str = "huge-pages", limit: int = 2 * GIB) -> subprocess.Popen[str]:
    """A program that limits a command which says its own and the watcher's process number, and goes
    on and on."""
    code = ("import sys, pathlib; from benchmarks.size import limit_dram as dram\n"
            f"machine = dram.Machine(root=pathlib.Path({str(machine.root)!r}))\n"
            "sys.exit(dram.run(['sh', '-c', 'echo $$; exec sleep 60'], "
            f"{limit}, {method!r}, machine))")
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


def watcher_of(program: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    (watcher,) = [int(pid) for pid in children if b"--watch" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return watcher


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.unit
def test_killed_outright_it_still_gives_back(machine: Machine) -> None:
    program = start(machine)
    command = int(program.stdout.readline())
    assert counts(machine) == [773, 256]
    program.kill()
    program.wait()
    wait_until(lambda: counts(machine) == [5, 0] and not machine.state_file("huge-pages").exists())
    wait_until(lambda: not is_running(command))


@pytest.mark.unit
def test_asked_to_end_it_ends_the_command_first(machine: Machine) -> None:
    program = start(machine)
    command = int(program.stdout.readline())
    program.terminate()
    assert program.wait() == 128 + signal.SIGTERM and not is_running(command)
    assert counts(machine) == [5, 0]


@pytest.mark.unit
def test_a_crash_of_everything_is_repaired_by_restore(machine: Machine) -> None:
    program = start(machine)
    program.stdout.readline()
    with pytest.raises(RatelError, match="this limit is in force"):
        dram.restore(machine)
    watcher = watcher_of(program)
    os.kill(watcher, signal.SIGKILL)
    program.kill()
    program.wait()
    wait_until(lambda: not is_running(watcher))
    assert counts(machine) == [773, 256]  # nobody is left to give back
    with pytest.raises(RatelError, match="was not given back.*--restore"):
        dram.run(TRUE, 2 * GIB, "huge-pages", machine)
    assert dram.restore(machine) is True
    assert counts(machine) == [5, 0] and dram.restore(machine) is False


@pytest.mark.unit
def test_without_its_watcher_a_result_does_not_count(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    kill_watcher = ("import os, signal; parent = os.getppid()\n"
                    "for pid in open(f'/proc/{parent}/task/{parent}/children').read().split():\n"
                    "    if '--watch' in open(f'/proc/{pid}/cmdline').read(): os.kill(int(pid), signal.SIGKILL)")
    assert dram.run([sys.executable, "-c", kill_watcher], 2 * GIB, "huge-pages", machine) == 1
    assert "do not trust its result" in capfd.readouterr().err
    assert counts(machine) == [5, 0] and not machine.state_file("huge-pages").exists()


@pytest.mark.unit
def test_after_a_restart_of_the_machine_nothing_is_written(machine: Machine) -> None:
    counter = machine.counters()[0]
    state = {"boot_id": "an earlier boot", "counts": {str(counter): "900"}, "groups": []}
    machine.state_file("huge-pages").write_text(json.dumps(state))
    assert dram.restore(machine) is True
    assert counts(machine) == [5, 0] and not machine.state_file("huge-pages").exists()


@pytest.mark.unit
@pytest.mark.parametrize(("arguments", "message"), [
    (["64GiB"], "a size and, after --, a command are needed"),
    (["--", "true"], "a size and, after --, a command are needed"),
    (["64potatoes", "--", "true"], "limit: not a size"),
    (["1TiB", "--method", "swap", "--", "true"], "invalid choice: 'swap'"),
    (["9999TiB", "--", "true"], "must be between"),
])
def test_mistakes_in_the_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = dram.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


# --- this machine ---------------------------------------------------------------------------------------------------

TAKEN = 64 * MIB


@pytest.mark.e2e
def test_locked_memory_for_real() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY and soft < 2 * TAKEN:
        pytest.skip(f"only {soft} bytes may be locked here (ulimit -l)")
    with taken_away(TAKEN, "mlock") as limit:
        status = Path(f"/proc/{limit.watcher.pid}/status").read_text()
    locked = next(int(line.split()[1]) * KIB for line in status.splitlines() if line.startswith("VmLck"))
    assert locked >= limit.taken_bytes > TAKEN // 2  # others' memory moves while it is measured
    assert limit.watcher.returncode == 0


@pytest.mark.e2e
def test_memory_that_may_not_be_locked_is_refused() -> None:
    """The limit of locked memory holds for whoever lacks CAP_IPC_LOCK, 14, which root can give up
    (prctl 24)."""
    code = ("import ctypes, os, resource, sys; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
            "assert os.geteuid() != 0 or ctypes.CDLL(None).prctl(24, 14, 0, 0, 0) == 0\n"
            "from benchmarks.size import limit_dram as dram\n"
            "available = dram.Machine().available_bytes()\n"
            "sys.exit(dram.main([str(available // 2), '--method', 'mlock', '--', 'true']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "memory cannot be held: " in done.stderr and "ulimit -l" in done.stderr, done.stderr


@pytest.mark.e2e
def test_huge_pages_for_real() -> None:
    if not all(os.access(counter, os.W_OK) for counter in Machine().counters()):
        pytest.skip("reserving huge pages takes root and a writable /sys")
    with taken_away(TAKEN) as limit:
        before = [int(text) for text in json.loads(Machine().state_file("huge-pages").read_text())["counts"].values()]
        more = sum(counts(Machine())) - sum(before)
        assert more * Machine().page_bytes() == limit.taken_bytes > TAKEN // 2
    wait_until(lambda: counts(Machine()) == before)  # unless the next test beside this one took its turn


@pytest.mark.e2e
def test_a_control_group_for_real(capfd: pytest.CaptureFixture[str]) -> None:
    """A command that wants more than its group may have is killed, and the group is gone."""
    try:
        group = Cgroup.create()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here ({error.strerror}); it takes root and a writable cgroup")
    remove_group(group.path)
    greedy = [sys.executable, "-c", f"bytearray(b'x' * {400 * MIB})"]
    assert dram.run(TRUE, 256 * MIB, "cgroup") == 0
    assert dram.run(greedy, 256 * MIB, "cgroup") == 137
    assert list(group.path.parent.glob("ratel-limit-*")) == []
    assert "0 B taken away (cgroup)" in capfd.readouterr().err
