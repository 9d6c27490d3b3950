"""The rules of the structure: the order of imports, who reads settings, who knows actors, and how large things are.

All of it over ast: nothing is imported. A table below may name what a rule does not hold for, and why. Each rule is
shown to catch a planted violation.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A room is a package or a module of that name; it imports from lower floors and from itself.
FLOORS = [
    "errors container",
    "files directories sampling hub profiles threads declare",
    "settings config csvlog digests kernels supervisor client split",
    "xlstm_ray generation_config layout tensors model memory text choose_stages",
    "headers",
    "cachefiles checkpoint state",
    "runtime quantize",
    "choose actors",
    "choose_kernels",
    "plan",
    "launch autoscale explain",
    "engine",
    "measure serve integrations",
    "cli",
    "__main__",
]
MAY_READ_SETTINGS = (
    r"settings|choose(_kernels|_stages)?|plan|explain|cli\..*|xlstm_ray"  # the package tells of unknown variables
)
MAY_KNOW_ACTORS = r"actors\..*|launch"
MAY_IMPORT_RAY = r"actors\..*|supervisor\.(connect|ray_inside)|serve\.(replica|remote|fleet)"
INSIDE_RAY = "supervisor.ray_inside"  # the one that knows Ray's inner parts
MAY_READ_ENVIRONMENT = {  # and why; all else is given what it needs
    "settings": "the table of variables",
    "client.keys": "a key is not an argument: other users of a machine can read those",
    "threads": "OpenMP's variables must be set before torch is loaded",
    "directories": "torch's own variable says where its cache is",
    "kernels.inductor": "torch's own variables say whether it compiles",
    "kernels.compiled": "Inductor's own variable says which compiler it takes",
    "supervisor.connect": "Ray reads its variables as it is imported; the token is looked for where Ray would",
    "supervisor.start": "the environment of a head's processes",
}
WITHOUT_TORCH = (
    "engine.scheduler engine.tree cachefiles supervisor actors.watchdog serve.routes"  # with all that they import
)
MAY_SAY_FLAGS = r"cli\..*"  # all others mark a field's name, `tile_size`, which cli.flags makes a flag of
RAYS_TOO = {"supervisor.start": {"--port"}}  # flags of Ray's own programs that ours has as well, where they are given
A_FLAG = r"--[a-z][a-z-]*[a-z]"
A_COMMAND = r"xlstm-ray [a-z]+( --[a-z-]+)*"  # is for a shell, whoever reads it
LINES, PARAMETERS = 400, 7
COMMAND = r"commands\.command|app\.callback|triton\.jit"  # a decorator: parameters are options, or a kernel's
LONG: dict[str, str] = {}  # file: why it is one piece
PUBLIC = {  # parameters are a caller's words, a formula's tensors, a value's fields
    "engine.engine.Engine.prefill",
    "engine.engine.Engine.generate",
    "integrations.nxai.mlstm_chunkwise.chunkwise",  # another library's words
    "integrations.nxai.mlstm_sequence.sequence",
    "integrations.nxai.mlstm_step.step",
    "kernels.chunkwise.mlstm_chunkwise",
    "state.RecurrentState.__init__",
}


# -- what is there -----------------------------------------------------------------------------------------------------
def trees(root: Path) -> dict[str, ast.Module]:
    """Every module of the library by its name without `xlstm_ray.`."""
    found = {}
    for folder in ("xlstm_ray", "actors"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / ("xlstm_ray" if folder == "xlstm_ray" else "")).with_suffix("").parts
            if folder == "actors" or parts[0] != "actors":  # xlstm_ray/actors is a link
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "xlstm_ray"
                found[name] = parsed(path.read_text())
    return found


parsed = cache(ast.parse)  # each rule reads all modules


@cache
def imports(tree: ast.Module) -> list[str]:
    """What a module imports, wherever in it: `a.b.name` for `from a.b import name`. No import may be relative."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return found


def arrows(root: Path) -> set[tuple[str, str]]:
    """(module, module that it imports) inside the library, without the names that the package offers to users."""
    there = trees(root)
    found = set()
    for module, tree in there.items():
        for name in imports(tree):
            if name.split(".")[0] == "xlstm_ray" and not (module == "xlstm_ray" and "settings" not in name):
                inner = name.removeprefix("xlstm_ray").strip(".")
                target = next((t for t in (inner, inner.rpartition(".")[0]) if t in there), "xlstm_ray")
                found |= {(module, target)} if target != module else set()
    return found


def strings(tree: ast.Module) -> Iterator[str]:
    """The texts in a module's code; docstrings are not in it."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = f"{within}.{getattr(node, 'name', '')}".strip(".")
        if isinstance(node, FUNCTION):
            yield name, node
        yield from functions(node, name if isinstance(node, (*FUNCTION, ast.ClassDef)) else within)


def needed(tree: ast.AST) -> Iterator[str]:
    """What a module imports when it is imported: not inside functions, and not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(ast.Module([node], []))
        elif not isinstance(node, FUNCTION) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            yield from needed(node)


# -- the rules: each gives what breaks it ------------------------------------------------------------------------------
def order(root: Path) -> set[str]:
    floor = {room: n for n, rooms in enumerate(FLOORS) for room in rooms.split()}
    relative = {name for name, tree in trees(root).items() if any(i.startswith(".") for i in imports(tree))}
    wrong = {f"{name} has a relative import" for name in relative}
    for a, b in arrows(root):
        above, below = a.split(".")[0], b.split(".")[0]
        wrong |= {f"{room} has no floor" for room in (above, below) if room not in floor}
        if above != below and floor.get(above, 99) <= floor.get(below, -1):
            wrong.add(f"{a} -> {b}")
    return wrong


def circles(root: Path) -> set[str]:
    """Modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for a, b in arrows(root):
        reached.setdefault(a, set()).add(b)
    for middle in list(reached):
        for ends in reached.values():
            if middle in ends:
                ends |= reached[middle]
    return {" ".join(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in reached if a in reached[a]}


def actors(root: Path) -> set[str]:
    known = {(a, b) for a, b in arrows(root) if b.split(".")[0] == "actors"}
    return {f"{a} -> {b}" for a, b in known if not re.fullmatch(MAY_KNOW_ACTORS, a)}


def ray(root: Path) -> set[str]:
    users = {name for name, tree in trees(root).items() if any(i.split(".")[0] == "ray" for i in imports(tree))}
    inside = {n for n, tree in trees(root).items() if any(i.startswith("ray._") for i in imports(tree))} - {INSIDE_RAY}
    return {name for name in users if not re.fullmatch(MAY_IMPORT_RAY, name)} | inside


def torch(root: Path) -> set[str]:
    """Modules that must not need torch, but import it or import a module that needs it."""
    there = trees(root)
    given = {name: {*needed(tree)} for name, tree in there.items()}

    def has(name: str, seen: set[str]) -> bool:
        seen.add(name)
        own = {i.removeprefix("xlstm_ray.") for i in given[name] if i.startswith("xlstm_ray.")}
        inner = {next((t for t in (i, i.rpartition(".")[0]) if t in there), name) for i in own} - seen
        return any(i.split(".")[0] == "torch" for i in given[name]) or any(has(i, seen) for i in inner)

    inside = [n for n in there for room in WITHOUT_TORCH.split() if n == room or n.startswith(f"{room}.")]
    return {name for name in inside if has(name, set())}


def environment(root: Path) -> set[str]:
    """Modules that read or write variables of the environment, however they call os."""
    found = set()
    for name, tree in trees(root).items():
        asked = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        asked |= {i.removeprefix("os.") for i in imports(tree) if i.startswith("os.")}
        if asked & {"environ", "environb", "getenv", "getenvb", "putenv"}:
            found.add(name)
    return found - {*MAY_READ_ENVIRONMENT}


def settings(root: Path) -> set[str]:
    """Modules that import settings, or take them from what they are given."""
    readers = {a for a, b in arrows(root) if b == "settings"}
    for name, tree in trees(root).items():
        if any("settings" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in ast.walk(tree)):
            readers.add(name)
    return {name for name in readers if not re.fullmatch(MAY_READ_SETTINGS, name)}


def flags(root: Path) -> set[str]:
    """Modules with texts that name a flag of this program, and how many texts. Ray's own flags do not count.

    A text that is a flag and nothing else is in the table that flags are made from, where it is in settings.
    """
    there = trees(root)
    tables = [node for room in ("settings", "sampling.params") for node in ast.walk(there.get(room, ast.parse("")))]
    fields = [n.target.id for n in tables if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    ours = {"--" + name.replace("_", "-") for name in fields}
    for name, tree in there.items():
        if re.fullmatch(rf"settings|{MAY_SAY_FLAGS}", name):
            ours |= {text for text in strings(tree) if re.fullmatch(A_FLAG, text)}
    ours |= {f"--no-{flag[2:]}" for flag in ours}
    found = set()
    for name, tree in there.items():
        texts = [text for text in strings(tree) if not (name == "settings" and text in ours)]
        known = ours - RAYS_TOO.get(name, set())
        said = [t for t in texts if known & set(re.findall(rf"(?<![\w-]){A_FLAG}", re.sub(A_COMMAND, "", t)))]
        if said and not re.fullmatch(MAY_SAY_FLAGS, name):
            found.add(f"{name} {len(said)}")
    return found


def lines(root: Path) -> set[str]:
    long = set()
    for folder in ("xlstm_ray", "actors"):
        for path in (root / folder).rglob("*.py"):
            if not path.is_relative_to(root / "xlstm_ray" / "actors") and path.read_text().count("\n") > LINES:
                long.add(str(path.relative_to(root)))
    return long - {*LONG}


def parameters(root: Path) -> set[str]:
    many = set()
    for module, tree in trees(root).items():
        for name, node in functions(tree):
            a = node.args
            count = sum(x.arg not in ("self", "cls") for x in [*a.posonlyargs, *a.args, *a.kwonlyargs])
            command = any(re.match(COMMAND, ast.unparse(d)) for d in node.decorator_list)
            if count > PARAMETERS and not command and f"{module}.{name}" not in PUBLIC:
                many.add(f"{module}.{name}")
    return many


RULES: list[Callable[[Path], set[str]]] = [
    *(order, circles, actors, ray, torch, environment, settings, flags, lines, parameters),
]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_is_as_it_should_be(rule):
    assert rule(ROOT) == set()


PLANTED = [
    ("order", "model.py", "def f():\n    from xlstm_ray.engine.engine import Engine\n", "model -> engine.engine"),
    ("order", "model.py", "from .engine.engine import Engine\n", "model has a relative import"),
    ("circles", "engine/driver.py", "from xlstm_ray.engine.engine import Engine\n", "engine.driver engine.engine"),
    ("actors", "measure/bench.py", "from xlstm_ray.actors.grid import RayExecutor\n", "measure.bench -> actors.grid"),
    ("ray", "choose.py", "def f():\n    import ray\n", "choose"),
    ("torch", "engine/tree.py", "from xlstm_ray.engine.driver import run\n", "engine.tree"),
    ("torch", "engine/scheduler.py", "class A:\n    from torch import Tensor\n", "engine.scheduler"),
    ("environment", "state.py", "from os import getenv as g\n\nhome = g('HOME')\n", "state"),
    ("settings", "state.py", "from xlstm_ray.settings import Settings\n", "state"),
    ("settings", "engine/driver.py", "def f(setup):\n    return setup.settings.dtype\n", "engine.driver"),
    ("settings", "engine/driver.py", "def f(setup):\n    return g(setup.settings)\n", "engine.driver"),
    (
        "flags",
        "settings.py",
        'class Settings:\n    tile_size: int\n    a, b = "--tile-size", "as --tile-size"\n',
        "settings 1",
    ),
    ("flags", "model.py", '"""--tile-size here is fine."""\nerror = f"--tile-size {1}: no"\n', "model 1"),
    ("lines", "model.py", "\n" * 401, "xlstm_ray/model.py"),
    ("parameters", "model.py", "async def f(a, b, c, d, e, f, g, h): ...\n", "model.f"),
    ("parameters", "model.py", "class A:\n    def f(self, a, b, c, d, e, f, *, g, h): ...\n", "model.A.f"),
]
HOUSE = {
    "settings.py": "class Settings:\n    tile_size: int\n",
    "engine/engine.py": "from xlstm_ray.engine.driver import run\n\nclass Engine: ...\n",
    "engine/driver.py": "import torch\nfrom xlstm_ray.model import f\n",
    "engine/tree.py": "if TYPE_CHECKING:\n    import torch\n\ndef f():\n    import torch\n",
    "model.py": "from xlstm_ray.settings import Settings\n",
    "actors/grid.py": "import ray\n",
    "choose.py": "from xlstm_ray.settings import Settings\n",
}


def test_each_rule_has_a_planted_violation():
    assert {planted[0] for planted in PLANTED} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(("name", "file", "source", "said"), PLANTED)
def test_a_planted_violation_is_caught(name, file, source, said, tmp_path):
    rule = next(rule for rule in RULES if rule.__name__ == name)
    for name, text in HOUSE.items():
        path = tmp_path / name if name.startswith("actors/") else tmp_path / "xlstm_ray" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name != "model.py" else "")
    assert rule(tmp_path) == set()
    path = tmp_path / "xlstm_ray" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert rule(tmp_path) == {said}


def test_a_room_without_a_floor_is_told(tmp_path):
    (tmp_path / "xlstm_ray").mkdir()
    (tmp_path / "xlstm_ray" / "cellar.py").write_text("from xlstm_ray.errors import XlstmRayError\n")
    (tmp_path / "xlstm_ray" / "errors.py").write_text("")
    assert order(tmp_path) == {"cellar has no floor"}
