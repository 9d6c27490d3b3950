"""Workflows and hooks name files and versions that exist."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(job: dict[str, Any]) -> list[str]:
    return [line for step in job["steps"] if "run" in step for line in step["run"].splitlines()]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_run_files_that_are_there(file: Path) -> None:
    found = yaml.safe_load(file.read_text())
    assert found["permissions"] == {"contents": "read"}
    assert True in found  # the key `on`, which YAML 1.1 reads so
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"actions/\w[\w-]*@v\d+", step["uses"]) if "uses" in step else step["run"]
        named = [word for line in steps(job) for word in line.split() if re.match(r"(\./)?(scripts|\.ci)/", word)]
        assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_supported_python_has_a_job() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == supported
    assert steps(jobs["fast"]) == ["./scripts/test fast"]
    assert steps(jobs["all"]) == [".ci/run"]


def test_hooks_are_the_checks_of_the_test_command() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    checks = re.findall(r'^"\$VENV/bin/(\w+)"(.*)$', (ROOT / "scripts" / "test").read_text(), re.MULTILINE)
    words = [(tool, *(word for word in rest.split() if word not in (".", "--check"))) for tool, rest in checks]
    assert len(words) == 3
    assert [tuple(hook["entry"].split()) for hook in repository["hooks"]] == words
