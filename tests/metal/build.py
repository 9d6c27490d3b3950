"""Shared libraries made by g++, once: kept under build/ by source, flags, compiler and torch version."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

NATIVE = Path(__file__).parent / "native"
CACHE = Path(__file__).parents[2] / "build" / "metal-simulator"
COMPILE = "g++ -std=c++20 -O1 -fPIC -shared".split()


class BuildError(Exception):
    """g++ did not accept a source; the message is its own."""


def missing_compiler() -> str | None:
    """The reason why nothing can be built here, or None."""
    return None if shutil.which("g++") else "g++ is not installed, and the simulated mps device is made with it"


@functools.cache
def _fixed_inputs() -> str:
    """What every library depends on besides its own source: compiler, torch, and the headers in native/."""
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    headers = [path.read_text() for path in sorted(NATIVE.glob("*.h"))]
    return "\0".join([compiler, torch.__version__, *headers])


@functools.cache
def precompiled(header: str, *flags: str) -> Path:
    """A folder in which g++ finds this header of native/ compiled: the half of what a shader takes."""
    key = hashlib.sha256("\0".join([_fixed_inputs(), header, *flags]).encode()).hexdigest()[:24]
    built = CACHE / f"headers-{key}" / f"{header}.gch"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch, built.name)
            subprocess.run([*COMPILE, "-x", "c++-header", str(NATIVE / header), "-o", str(made), *flags], check=True)
            os.replace(made, built)
    return built.parent


def shared_library(name: str, source: str, flags: Sequence[str]) -> Path:
    """Path of the shared library made of this C++ source; `name` only makes the cached file recognisable.

    Safe to call from several threads and processes: each builds a file of its own and renames it into place.
    Raises BuildError.
    """
    key = hashlib.sha256("\0".join([_fixed_inputs(), source, *flags]).encode()).hexdigest()[:24]
    library = CACHE / f"{name}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        text, built = Path(scratch, f"{name}.cpp"), Path(scratch, f"{name}.so")
        text.write_text(source)
        command = [*COMPILE, str(text), "-o", str(built), *flags, f"-I{NATIVE}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(result.stderr)
        os.replace(text, library.with_suffix(".cpp"))  # to look a line number up that an error mentions
        os.replace(built, library)
    return library
