"""Builds the C++ runner for this machine: a compiler, ONNX Runtime's headers and the library of the Python package."""
from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

SOURCE = Path(__file__).parents[3] / "actors" / "targets" / "runner"
SONAME = "libonnxruntime.so.1"      # what a program linked with it asks for
BUILD_TIMEOUT_S = 300.0


class CannotBuildError(Exception):
    """What this machine lacks."""


def header_folder() -> Path:
    folders = [Path(name) for name in (os.environ.get("ORT_INCLUDE_DIR", ""), "/usr/include/onnxruntime",
                                       "/usr/local/include/onnxruntime") if name]
    for folder in folders:
        if (folder / "onnxruntime_cxx_api.h").exists():
            return folder
    raise CannotBuildError(f"no onnxruntime_cxx_api.h in {', '.join(map(str, folders))}; set ORT_INCLUDE_DIR to its "
                           "folder (actors/targets/runner/README.md says where to get it)")


def library() -> Path:
    found = sorted(Path(onnxruntime.__file__).with_name("capi").glob("libonnxruntime.so*"))
    if not found:
        raise CannotBuildError(f"the Python package onnxruntime {onnxruntime.__version__} brings no libonnxruntime.so")
    return found[0]


def compiler() -> str:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if name is None:
        raise CannotBuildError("no C++ compiler; install g++ or set CXX")
    return name


def compile_runner(folder: Path, defines: Sequence[str] = ()) -> Path:
    """The object file; warnings are errors."""
    path = folder / "paretoray_runner.o"
    _call([compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-isystem",
           str(header_folder()), *(f"-D{define}" for define in defines), "-c", str(SOURCE / "paretoray_runner.cc"),
           "-o", str(path)])
    return path


def link_runner(folder: Path, compiled: Path, with_library: Path) -> Path:
    """The program; it finds the library beside it."""
    folder.mkdir(exist_ok=True)
    if with_library.parent != folder:
        (folder / SONAME).symlink_to(with_library)
    program = folder / "paretoray_runner"
    _call([compiler(), str(compiled), str(folder / SONAME), "-Wl,-rpath,$ORIGIN", "-o", str(program)])
    return program


def build_runner(folder: Path, defines: Sequence[str] = ()) -> Path:
    """Raises CannotBuildError with what is missing."""
    return link_runner(folder, compile_runner(folder, defines), library())


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"
