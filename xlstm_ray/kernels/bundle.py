"""Compiled code in one file, for machines of one kind: the files of torch's compile cache, with their digests.

torch has a portable cache (`torch.compiler.save_cache_artifacts`), but it leaves out what the C++ compiler has made,
which is most of the wait on a CPU, and reading it unpickles it. Here files are only copied, to the directory from which
torch itself reads code. Code can do anything: so such a file is trusted as a program is. No torch, until `machine`.
"""

import hashlib
import json
import os
import platform
import re
import stat
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlstm_ray.directories import compile_cache_dir
from xlstm_ray.errors import KernelError, one_line
from xlstm_ray.files import write_whole
from xlstm_ray.kernels.inductor import compiler_version

if TYPE_CHECKING:
    import torch

FORMAT, ABOUT = "xlstm-ray compiled code 1", "about.json"
MOST = 1 << 30  # bytes of all files: a model's code is some MB
_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*")


def machine(device: "torch.device", threads: str) -> dict[str, str]:
    """What code is compiled for: it is right, or found, only where all of this is the same."""
    import torch

    facts = {
        "torch": f"{torch.__version__} in {Path(torch.__file__).parent}",  # the path is in the compiler's command line
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": threads,  # are compiled in
        "device": device.type,
    }
    if device.type == "cpu":
        facts["compiler"] = compiler_version()
    if device.type == "cuda":
        facts["device"] += f", {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return facts


def _processor() -> str:
    """The processor's name, and a digest of all that it can do: code is for this very kind (-march=native)."""
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    rows = dict(line.split("\t", 1) for line in lines if "\t" in line)
    found = {name.strip(): value.strip(" \t:") for name, value in rows.items()}
    flags = " ".join(sorted(found.get("flags", found.get("Features", "")).split()))
    return f"{found.get('model name', platform.machine())} ({hashlib.sha256(flags.encode()).hexdigest()[:12]})"


def pack(directory: Path, path: Path, facts: dict[str, str], about: dict[str, Any]) -> str:
    """Write the files of a compile cache as one; returns its digest. facts: of `machine`; about: for people."""
    names = [str(file.relative_to(directory)) for file in sorted(directory.rglob("*")) if file.is_file()]
    names = [name for name in names if _wanted(name)]
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    header = {"format": FORMAT, "machine": facts, "about": about, "files": digests}
    spool = directory / "packed.tmp"
    with zipfile.ZipFile(spool, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ABOUT, json.dumps(header), zipfile.ZIP_STORED)  # `files.CODE` looks for its beginning
        for name in names:
            archive.write(directory / name, name)
    data = spool.read_bytes()
    spool.unlink()
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def _wanted(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and not name.endswith((".lock", ".tmp"))


class Code(NamedTuple):
    """What `read` has found in a file. about: for people."""

    path: Path
    facts: dict[str, str]
    about: dict[str, Any]
    files: list[tuple[str, bytes]]

    def install(self, here: dict[str, str]) -> None:
        """Put the files into the compile cache, unless they are there. here: of `machine`.

        Raises KernelError if they were made on another kind of machine; nothing is written then.
        """
        for name, fact in here.items():
            if (made := self.facts.get(name)) != fact:
                raise KernelError(
                    f"{self.path}: was made for another {name} ({one_line(made)}; here: {fact}); leave it out, "
                    "and this machine compiles"
                )
        cache = compile_cache_dir()
        try:
            for name, content in self.files:
                if not (place := cache / name).exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(place, content)
        except OSError as err:
            raise KernelError(f"the compile cache {cache} cannot be written ({err.strerror})") from None


def read(path: Path, digest: str | None = None) -> Code:
    """The code in a file of `pack`, checked. digest: of the file; without one, only this user and root may write it.

    Raises KernelError for a file that somebody else may have made, or that is damaged.
    """
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(MOST + 1)
    except OSError as err:
        raise KernelError(f"{path}: cannot be read ({err.strerror})") from None
    mode = stat.S_IMODE(info.st_mode)
    if digest is None and (info.st_uid not in (0, os.getuid()) or mode & 0o022):
        raise KernelError(
            f"{path}: others may have written it (its owner is {info.st_uid}, its mode {mode:03o}), and code can do "
            "anything; give `cache_digest`, which was printed when it was made, or take the others' right: chmod go-w"
        )
    if digest is not None and hashlib.sha256(data).hexdigest() != digest.lower():
        raise KernelError(f"{path}: has not the digest {one_line(digest)}; nothing of it is used")
    try:
        return _read(path, data)
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, EOFError, NotImplementedError) as err:
        raise KernelError(f"{path}: is not compiled code of this program, or is damaged ({one_line(err)})") from None


def _read(path: Path, data: bytes) -> Code:
    """Raises what zipfile and json do, ValueError for what is wrong."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        header = json.loads(archive.read(ABOUT))
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("another format")
        facts, about, digests = (header[key] for key in ("machine", "about", "files"))
        if not all(isinstance(part, dict) for part in (facts, about, digests)):
            raise ValueError("a wrong header")
        if len(data) > MOST or sum(entry.file_size for entry in archive.infolist()) > MOST:
            raise ValueError("too large")
        return Code(path, facts, about, list(_files(archive, digests)))


def _files(archive: zipfile.ZipFile, digests: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for name, digest in digests.items():
        content = archive.read(name)
        if not _wanted(name) or hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name} is not what it was")
        yield name, content
