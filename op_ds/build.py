"""Compiles op_ds/csrc into one shared library with the machine's C++ compiler; needs neither torch
nor setuptools."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from op_ds.library import LIBRARY_PATH

SOURCE_DIR = Path(__file__).parent / "csrc"

# The same for every file: what a file needs beyond the baseline it asks for itself, function by
# function, so that the library loads on any machine of the architecture. No contraction: each
# rounding is written down in the source.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-ffp-contract=off")


class BuildError(RuntimeError):
    """The native library could not be compiled; the message says what to install or shows the
    compiler's words."""


def find_compiler() -> str:
    """``$CXX`` when set, else the first of g++, clang++ and c++ that is on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name
    missing = f"the C++ compiler {wanted!r} named by CXX was not found" if wanted else "no C++ compiler was found"
    raise BuildError(f"op_ds: {missing}. Install the package g++ (Debian, Ubuntu: apt-get install g++; Fedora: "
                     "dnf install gcc-c++; Alpine: apk add g++), or set CXX")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"op_ds: {' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")


def build(out_dir: str | os.PathLike[str] | None = None) -> Path:
    """Compile and link; returns the library's path. A library that is in use is replaced, never
    written into."""
    target = Path(out_dir or LIBRARY_PATH.parent) / LIBRARY_PATH.name
    compiler = find_compiler().split()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        def compile_one(source: Path) -> str:
            result = os.path.join(scratch, source.stem + ".o")
            _run([*compiler, *FLAGS, "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, sorted(SOURCE_DIR.glob("*.cpp"))))
        linked = os.path.join(scratch, target.name)
        _run([*compiler, *FLAGS, "-shared", *objects, "-o", linked])
        os.replace(linked, target)
    return target


if __name__ == "__main__":
    try:
        print(build(sys.argv[1] if len(sys.argv) > 1 else None))
    except BuildError as error:
        sys.exit(str(error))
