"""What a machine has of memory, and two ways of leaving a program less of it: huge pages and
control groups."""

import os
import signal
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

_STATE_NAME = "ratel-limit-dram"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the kernel shows and takes its numbers; tests give a directory that looks like
    ``/``."""

    root: Path = Path("/")

    def available_bytes(self) -> int:
        return meminfo(self.root / "proc/meminfo")["MemAvailable"]

    def page_bytes(self) -> int:
        return meminfo(self.root / "proc/meminfo")["Hugepagesize"]

    def counters(self) -> list[Path]:
        """The count of huge pages of each NUMA node; the only one of a kernel without nodes."""
        name = f"hugepages/hugepages-{self.page_bytes() // 1024}kB/nr_hugepages"
        nodes = sorted((self.root / "sys/devices/system/node").glob(f"node[0-9]*/{name}"))
        return nodes or [self.root / "sys/kernel/mm" / name]

    def free_bytes(self, counter: Path) -> int:
        """What a node could still give: free memory and page cache."""
        info = counter.parents[2] / "meminfo"
        if not info.exists():
            return self.available_bytes()
        facts = meminfo(info)
        return facts["MemFree"] + facts.get("FilePages", 0)

    def set_count(self, counter: Path, pages: int) -> None:
        """The kernel takes any number and gives what it finds."""
        counter.write_text(str(pages))

    def boot_id(self) -> str:
        path = self.root / "proc/sys/kernel/random/boot_id"
        return path.read_text().strip() if path.exists() else ""

    def make_room(self) -> None:
        """Drop clean page cache and move pages together, so that whole huge pages become free."""
        os.sync()
        for name, text in (("drop_caches", "1"), ("compact_memory", "1")):
            try:
                (self.root / "proc/sys/vm" / name).write_text(text)
            except OSError:
                pass  # not in every kernel; what is missing in the end is noticed

    def state_file(self, method: str) -> Path:
        """Reservations of huge pages write the same counters and so exclude each other; the rest do
        not."""
        number = "" if method == "huge-pages" else f"-{os.getpid()}"
        return self._state_folder() / f"{_STATE_NAME}{number}.json"

    def state_files(self) -> list[Path]:
        return sorted(self._state_folder().glob(f"{_STATE_NAME}*.json"))

    def _state_folder(self) -> Path:
        """Below /run files are gone after a restart, as reservations are."""
        folder = self.root / "run"
        return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def meminfo(path: Path) -> dict[str, int]:
    """Bytes by name; the lines of a node begin with ``Node 0``."""
    rows = [line.split() for line in path.read_text().splitlines()]
    rows = [row[2:] if row[:1] == ["Node"] else row for row in rows]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


# --- huge pages -----------------------------------------------------------------------------------------------------


def reserve_pages(machine: Machine, num_bytes: int) -> int:
    """Add huge pages of ``num_bytes`` in all; returns the bytes that the kernel really gave. Undo
    by writing back what the counters held."""
    page, everywhere, room_was_made = machine.page_bytes(), machine.counters(), False
    wanted, got, giving = num_bytes // page, 0, everywhere
    while got < wanted:
        shares = _shares(machine, giving, wanted - got)
        given = {counter: _add(machine, counter, pages) for counter, pages in shares.items()}
        got += sum(given.values())
        giving = [counter for counter in giving if given[counter] == shares[counter]]
        if not giving:
            if room_was_made:
                break
            machine.make_room()
            giving, room_was_made = everywhere, True
    return got * page


def _add(machine: Machine, counter: Path, pages: int) -> int:
    before = int(counter.read_text())
    machine.set_count(counter, before + pages)
    return int(counter.read_text()) - before


def _shares(machine: Machine, counters: list[Path], pages: int) -> dict[Path, int]:
    """``pages`` by what each node has free, so that what is left is spread as it was."""
    free = {counter: machine.free_bytes(counter) for counter in counters}
    total = max(1, sum(free.values()))
    shares = {counter: pages * amount // total for counter, amount in free.items()}
    shares[max(free, key=free.get)] += pages - sum(shares.values())
    return shares


# --- control groups -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cgroup:
    """A memory control group, version 1 or 2."""

    path: Path
    version: int

    @classmethod
    def create(cls, machine: Machine = Machine()) -> "Cgroup":
        """Below the root's group for memory; raises OSError where that is not allowed."""
        root = machine.root / "sys/fs/cgroup"
        version = 1 if (root / "memory" / "memory.limit_in_bytes").exists() else 2
        above = root / "memory" if version == 1 else root
        if version == 2 and "memory" not in (above / "cgroup.subtree_control").read_text().split():
            (above / "cgroup.subtree_control").write_text("+memory")
        group = cls(above / f"ratel-limit-{uuid.uuid4().hex}", version)
        group.path.mkdir()
        return group

    def limit(self, num_bytes: int) -> None:
        """Memory, and none of it in swap."""
        if self.version == 1:
            self._write("memory.limit_in_bytes", num_bytes)
            self._write_if_there("memory.memsw.limit_in_bytes", num_bytes)
        else:
            self._write("memory.max", num_bytes)
            self._write_if_there("memory.swap.max", 0)

    @property
    def kills(self) -> int:
        """Processes that the limit has cost so far."""
        text = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))

    def enter(self, command: list[str]) -> list[str]:
        """The command, in the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def _write_if_there(self, name: str, value: int) -> None:
        if (self.path / name).exists():
            self._write(name, value)


def remove_group(path: Path) -> None:
    """End what is left in the group, and the group."""
    deadline_s = time.monotonic() + 10
    while path.exists():
        for pid in (path / "cgroup.procs").read_text().split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)  # the killed are still on their way out
