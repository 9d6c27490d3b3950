"""README's commands and Python example run unchanged, in an environment like the one of its first command."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import programs
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = "--chunkwise-backend native"  # kernels that need not be compiled for this test


def shown(command: str) -> list[str]:
    """The lines of README that are such a command, without comments."""
    return [" ".join(line.split()) for line in re.findall(rf"^({command})(?:\s+#.*)?$", README, re.MULTILINE)]


# What README shows -> what is added at its end, where later options win.
RUN = {
    './scripts/run prefill --prompt "The capital of France is"': SMALL,
    'xlstm-ray generate --prompt "The capital of France is" --max-new-tokens 8': SMALL,
    "xlstm-ray prefill --model DIR --prompt-file book.txt --state-out book.state": SMALL,
    "xlstm-ray generate --model DIR --state-in book.state": "--max-new-tokens 2",
    'xlstm-ray generate --model DIR --state-in book.state --append "Who is the heir?"': "--max-new-tokens 2",
    "xlstm-ray generate --model DIR --state-in book.state --append-file questions.jsonl --jsonl": "--max-new-tokens 2",
    "xlstm-ray prefill --prompt-file prompts.jsonl --jsonl": SMALL,
    "xlstm-ray prefill --prompt-file - --json --progress ndjson < book.txt": SMALL,
    "xlstm-ray models": "",
    "xlstm-ray quantize DIR DIR-8bit --bits 8": "",
    "xlstm-ray quantize DIR DIR-4bit --bits 4 --group-size 32": "",
    'xlstm-ray generate --model DIR-4bit --prompt "The capital of France is"': "--max-new-tokens 2 " + SMALL,
    "xlstm-ray models --json": "",
    "xlstm-ray plan --model DIR-4bit --device m1 --memory-gb 8 --prompt-tokens 65536": "",
    'xlstm-ray chat --model DIR --system "Be brief." --temperature 0.7': SMALL,
    "xlstm-ray chat --model DIR --json < questions.txt": SMALL + " --max-new-tokens 2",
    "xlstm-ray generate --model DIR --chat-template chat.jinja --messages talk.json": SMALL + " --max-new-tokens 8",
    "xlstm-ray score --model DIR --file book.txt --file questions.txt --json": SMALL,
    "xlstm-ray config": "",
    "xlstm-ray plan --model DIR --device m2-ultra --prompt-tokens 65536": "",
    "xlstm-ray plan --model DIR --device h200 --spans 4 --prompt-tokens 65536": "",
    "xlstm-ray bench --lengths 512,2048,8192": "--lengths 8 --backends native --rounds 1",
    "export XLSTM_RAY_LOCAL_MODE=0": "",
}
# What is not run here, and why. Its options are parsed all the same.
SERVED = "a service, which goes on until it is ended: tests/serve/test_clients.py runs it"
CLIENT = "it asks a service: tests/serve/test_client_commands.py runs it"
RAY = "a Ray head and actors that compile: tests/actors/test_grid.py and tests/supervisor/test_supervisor.py run them"
NOT_RUN = {
    "xlstm-ray chat --model DIR --state-in book.state": "tests/cli/test_chat_command.py runs it",
    "xlstm-ray warm-up --model DIR --cache-out code.zip": "it compiles: tests/cli/test_warm_up_command.py runs it",
    "xlstm-ray score --model DIR --file book.txt": "the next one does the same, and more",
    "./scripts/test": "it runs this test",
    "EXTRAS=serve ./scripts/run serve": SERVED,
    "pip install '.[serve]'": "it installs: tests/test_packages.py knows what",
    "xlstm-ray serve --model DIR --cache-dir cache": SERVED,
    **dict.fromkeys(shown(r"curl .*?"), SERVED),
    **dict.fromkeys(shown(r"xlstm-ray client .*?"), CLIENT),
    "xlstm-ray download NX-AI/xLSTM-7b": "14 GB of the network: tests/cli/test_models.py has a hub of its own",
    "xlstm-ray parity model --model DIR-4bit": "minutes of compiling: tests/measure/test_parity_command.py runs it",
    "xlstm-ray parity": "minutes of compiling: tests/measure/test_parity_command.py runs it",
    "EXTRAS=bench ./scripts/run bench --lengths 512,2048,8192 --png bench.png": "installs: test_bench.py draws",
    "xlstm-ray prefill --model DIR --prompt-file book.txt --chunkwise-backend ray_compiled_chunks --stages 2": RAY,
    "xlstm-ray up --ray-dashboard": RAY,
    "xlstm-ray generate --model DIR --prompt-file book.txt --chunkwise-backend ray_compiled_chunks --stages 4 "
    "--ray-address HOST:PORT --journal book.journal": RAY,
    "xlstm-ray generate ... --resume book.journal": RAY,
}


def commands() -> list[str]:
    """The lines of README's shell blocks, without comments, each on one line."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in (re.sub(r"\s+#.*", "", line) for line in lines) if line.strip()]


def needed(requirements: list[str]) -> set[str]:
    """The names of the distributions that pip installs for these."""
    names: set[str] = set()
    done: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        wanted, extra = todo.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        names.add(name)
        for own in ["", *wanted.extras]:
            if (name, own) not in done:
                done.add((name, own))
                todo += [(Requirement(text), own) for text in metadata.requires(name) or []]
    return names


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which Python finds only the distributions that the first command installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = needed(project["dependencies"]) | {"xlstm-ray", "pip", "setuptools"}
    others = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & there
    ]
    assert {"transformers", "matplotlib", "hypothesis"} <= set(others)
    assert not {"ray", "torch", "typer", "aiohttp"} & set(others)
    directory = tmp_path_factory.mktemp("site")
    (directory / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Fresh(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        absent = name.partition('.')[0] in {set(others)!r}\n"
        "        return None if absent else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Fresh\n"
    )
    # For ./scripts/run: an environment that is there and has all of it.
    venv = directory / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".installed-base").touch()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PATH": path, "PYTHONPATH": python_path, "VENV": str(venv)}
    programs.keep_warm(env)
    return env


def shell(line: str, directory: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = line.replace("./scripts/", f"{ROOT}/scripts/")
    line = re.sub(r"DIR(-\w+)?", lambda name: f"demo{name[1]}" if name[1] else str(ROOT / "xlstm_ray" / "demo"), line)
    how: dict = {"cwd": directory, "env": env, "capture_output": True, "text": True, "timeout": 300}
    command, redirected, file = line.partition(" < ")
    # What a shell would do with such a line is little, and `programs` starts it in a tenth of the time.
    if command.startswith("xlstm-ray ") and not set(command) & set("<>|&;$`*?~#(){}\\"):
        with open(directory / file if redirected else os.devnull) as stdin:
            return programs.run([programs.PROGRAM, *shlex.split(command)[1:]], stdin=stdin, **how)
    return subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, **how)


def test_every_command_is_run_here_or_says_why_not() -> None:
    assert sorted(commands()) == sorted([*RUN, *NOT_RUN])


def test_commands_run_one_after_the_other(fresh: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time\n")
    (tmp_path / "questions.jsonl").write_text('"Who is the heir?"\n{"prompt": "And then?", "id": 2}\n')
    (tmp_path / "questions.txt").write_text("Who is the heir?\nAnd then?\n")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "talk.json").write_text('[{"role": "user", "content": "The capital of France is"}]')
    (tmp_path / "prompts.jsonl").write_text('"Once"\n{"prompt": "The capital of France is"}\n')
    said = {}
    for command in (command for command in commands() if command in RUN):
        left, redirected, right = command.partition(" <")
        done = shell(f"{left} {RUN[command]} {redirected}{right}", tmp_path, fresh)
        assert done.returncode == 0, (command, done.stderr)
        said[command] = done.stdout
    assert "' Paris'" in said['./scripts/run prefill --prompt "The capital of France is"']
    assert " Paris" in said["xlstm-ray generate --model DIR --chat-template chat.jinja --messages talk.json"]
    for several in (
        "chat --model DIR --json < questions.txt",
        "score --model DIR --file book.txt --file questions.txt",
    ):
        (text,) = [text for command, text in said.items() if several in command]
        assert text.count("\n") == 2
    for lines in (
        "prefill --prompt-file prompts.jsonl",
        "generate --model DIR --state-in book.state --append-file questions.jsonl",
    ):
        assert said[f"xlstm-ray {lines} --jsonl"].count("\n") == 2


@pytest.mark.parametrize("command", [command for command in NOT_RUN if "xlstm-ray" in command])
def test_options_of_the_other_commands_exist(command: str, fresh: dict[str, str], tmp_path: Path) -> None:
    done = shell(f"{command.replace('...', '')} --help", tmp_path, fresh)
    assert done.returncode == 0, done.stderr


def test_files_that_are_named_are_there() -> None:
    named = set(re.findall(r"(?:scripts|deploy|xlstm_ray|tests)/[\w/]+\.(?:py|md|yaml|sh)", README))
    assert {"scripts/test_metal_parity.py", "scripts/run_hf_xlstm_metal.py", "deploy/RUNBOOK.md"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_benchmark_says_what_it_needs_first(fresh: dict[str, str], tmp_path: Path) -> None:
    done = shell(f"python {ROOT}/scripts/bench_prefill.py --rounds 7", tmp_path, fresh)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{sys.executable} -m pip install 'transformers" in done.stderr
    assert "Traceback" not in done.stderr
    assert shell(f"python {ROOT}/scripts/bench_grid.py --help", tmp_path, fresh).returncode == 0


def test_python_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    said = []
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 10
        exec(compile(example, str(ROOT / "README.md"), "exec"), {})
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert (tmp_path / "france.state").is_file()
    assert " Paris" in said[0]
    assert len(eval(said[1])) == 2
