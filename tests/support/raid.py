"""A machine of stand-ins for the programs that make_raid.sh calls. No tests here."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "make_raid.sh"
A, B, ARRAY = "/dev/nvme8n1", "/dev/nvme9n1", "/dev/md77"
LOOKS = {"lsblk", "findmnt", "swapon", "wipefs", "blkid", "id"}
"""Stand-ins that only answer. A wipefs that is asked to erase would be recorded as a change.

They are started 20 times a test: importing json would take twice as long as all else that they do,
so they read and write what Python's repr gives."""

STAND_IN = """#!REAL_PYTHON -SE
import os, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
machine = eval(open(os.environ["MACHINE"]).read())
with open(os.environ["CALLS"], "a") as calls:
    calls.write(repr([name, *args]) + "\\n")

def after(flag):
    return args[args.index(flag) + 1]

def give(lines):
    if not lines:
        sys.exit(1)
    print("\\n".join(lines))

if f"{name} {args[0]}" in machine["failing"] or name in machine["failing"]:
    sys.exit(5)
elif name == "lsblk":
    drive = machine["drives"].get(args[-1])
    rows = [drive, *drive.get("children", [])] if drive else []
    give([" ".join(str(row[column]) for column in after("--output").split(","))
          for row in (rows[:1] if "--nodeps" in args else rows)])
elif name == "findmnt" and "--target" in args:
    give([machine["targets"].get(after("--target"), "259:0")])
elif name == "findmnt" and "--source" in args:
    give(machine["drives"].get(after("--source"), {}).get("mounts", []))
elif name == "findmnt":
    give([after("--mountpoint")] if after("--mountpoint") in machine["mount_points"] else [])
elif name == "swapon":
    print("\\n".join(machine["swaps"]))
elif name == "wipefs":
    print("\\n".join(machine["drives"][args[-1]].get("signatures", [])))
elif name == "blkid":
    print("0a1b-uuid")
elif name == "id":
    print(machine["uid"])
elif name == "mdadm" and args[0] == "--detail":
    give(machine["detail"])
"""


def drive(path: str, minor: int, **more: Any) -> dict[str, Any]:
    return {"NAME": path, "TYPE": "disk", "RO": 0, "SIZE": "3.5T", "MODEL": "FAST\\x20DRIVE", "MAJ:MIN": f"259:{minor}",
            **more}


class Machine:
    """What the stand-ins answer from, and what they were asked."""

    def __init__(self, root: Path) -> None:
        self.root, self.mount = root, root / "mnt" / "raid"
        self.facts: dict[str, Any] = {
            "drives": {A: drive(A, 8), B: drive(B, 9), ARRAY: drive(ARRAY, 77, TYPE="raid0", mounts=[])},
            "targets": {}, "mount_points": [], "swaps": [], "uid": 0, "failing": [],
            "detail": ["MD_LEVEL=raid0", "MD_DEVICES=2", "MD_NAME=host:ratel-md77", "MD_DEVICE_dev_nvme8n1_ROLE=0",
                       f"MD_DEVICE_dev_nvme8n1_DEV={A}", "MD_DEVICE_dev_nvme9n1_ROLE=1",
                       f"MD_DEVICE_dev_nvme9n1_DEV={B}"]}
        self.programs = root / "programs"
        self.programs.mkdir()
        for name in (*LOOKS, "mdadm", "mkfs.xfs", "mkfs.ext4", "mount", "umount", "chown"):
            (self.programs / name).write_text(STAND_IN.replace("REAL_PYTHON", sys.executable))
            (self.programs / name).chmod(0o755)
        for name in ("readlink", "ls", "mkdir", "sed"):
            (self.programs / name).symlink_to(shutil.which(name))

    def run(self, *arguments: str, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        (self.root / "machine").write_text(repr(self.facts))
        (self.root / "calls").write_text("")
        names = {"PATH": str(self.programs), "MACHINE": str(self.root / "machine"),
                 "CALLS": str(self.root / "calls"), **environment}
        return subprocess.run([shutil.which("bash"), str(SCRIPT), *arguments], cwd=self.root, env=names, input=answer,
                              capture_output=True, text=True, timeout=patience(60))

    def make(self, *arguments: str, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("--mount", str(self.mount), "--array", ARRAY, *arguments, answer=answer, **environment)

    @property
    def changes(self) -> list[str]:
        calls = [ast.literal_eval(line) for line in (self.root / "calls").read_text().splitlines()]
        return [" ".join(call) for call in calls if call[0] not in LOOKS and call[:2] != ["mdadm", "--detail"]
                or call[0] == "wipefs" and "--all" in call]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def commands(machine: Machine, fs: str = "mkfs.xfs -q -f", kind: str = "xfs") -> list[str]:
    return [f"mdadm --create {ARRAY} --level=0 --metadata=1.2 --chunk=512K --name=ratel-md77 --raid-devices=2 {A} {B}",
            f"{fs} {ARRAY}", f"mount -t {kind} -o noatime {ARRAY} {machine.mount}"]
