"""Compiles csrc/ into one shared library with the machine's C++ compiler: ``python -m
nvme_ds.build``."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvme_ds.errors import BuildError
from nvme_ds.native import LIBRARY_NAME

SOURCES = Path(__file__).parent / "csrc"
DEFAULT_OUT_DIR = Path(__file__).parent / "_lib"
FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-std=c++17", "-Wall", "-Wextra"]
# A Python distribution may bring a C++ runtime older than the compiler's: carry our own, unseen by
# others.
OWN_RUNTIME = ["-static-libstdc++", "-static-libgcc"]
EXPORTS = "{ global: nds_*; local: *; };"  # visibility flags alone leave the standard library's templates visible


def find_compiler() -> list[str]:
    """The command in ``CXX``, or the first of g++, c++ and clang++."""
    asked = shlex.split(os.environ.get("CXX", ""))
    candidates = [asked] if asked else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    wanted = asked[0] if asked else "g++"
    raise BuildError(f"nvme_ds needs a C++17 compiler and found no {wanted}. Install g++ (Debian/Ubuntu: apt install "
                     "build-essential, Fedora: dnf install gcc-c++), or name another compiler in CXX")


def build(out_dir: str | Path | None = None, *, sanitize: str | None = None) -> Path:
    """Compile and link; returns the library. ``sanitize``: ``"thread"`` or ``"address"``, for tests
    of the engine itself."""
    compiler = find_compiler()
    out_dir = Path(out_dir) if out_dir else DEFAULT_OUT_DIR
    out_dir.mkdir(parents=True, exist_ok=True)
    extra = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []
    target = out_dir / (f"libnvme_ds-{sanitize}.so" if sanitize else LIBRARY_NAME)
    with tempfile.TemporaryDirectory() as scratch:
        objects = _compile_all(compiler + FLAGS + extra, Path(scratch))
        linked = Path(scratch) / target.name
        _link(compiler + ["-pthread", *extra], objects, linked, own_runtime=not sanitize)
        # Renamed into place: a process that has the old library mapped keeps it whole.
        staged = out_dir / f".{target.name}.{os.getpid()}"
        shutil.copy2(linked, staged)
        os.replace(staged, target)
    return target


def _compile_all(command: list[str], scratch: Path) -> list[Path]:
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [scratch / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        list(workers.map(lambda pair: _run([*command, "-c", str(pair[0]), "-o", str(pair[1])]), zip(sources, objects)))
    return objects


def _link(command: list[str], objects: list[Path], target: Path, *, own_runtime: bool) -> None:
    exports = target.with_name("exports.map")
    exports.write_text(EXPORTS)
    base = [*command, "-shared", f"-Wl,--version-script={exports}", *map(str, objects), "-o", str(target)]
    if own_runtime:
        try:
            return _run(base + OWN_RUNTIME)
        except BuildError:
            pass  # no static C++ runtime installed (its own package on some distributions): the shared one will do
    _run(base)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}. Install g++ (apt install build-essential)") from error
    if done.returncode:
        raise BuildError("nvme_ds does not compile (g++ of build-essential is known to work):\n"
                         f"{shlex.join(command)}\n{done.stderr}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nvme_ds.build", description=__doc__)
    parser.add_argument("--out", help=f"directory for the library (default: {DEFAULT_OUT_DIR})")
    parser.add_argument("--sanitize", choices=["thread", "address"], help="build libnvme_ds-<sanitizer>.so instead")
    options = parser.parse_args(arguments)
    try:
        print(build(options.out, sanitize=options.sanitize))
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
