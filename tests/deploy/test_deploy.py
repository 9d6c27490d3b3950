"""The files in deploy/, checked by the schema or the parser of the tool that reads them."""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import typer
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from xlstm_ray.cli.app import app
from xlstm_ray.cli.serve import serve

DEPLOY = Path(__file__).parents[2] / "deploy"

# The fields of KubeRay's own types, from the API reference of its release v1.7.0 (ray-project/kuberay, commit
# 97509c3a7216cf3440af381646560a1885afb53b, docs/reference/api.md), without those that take a page of their own and that
# no file here uses. Pod templates are Kubernetes' own and are checked for what they hold further down.
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


GROUP = {
    "rayStartParams": STRINGS,
    "resources": STRINGS,
    "labels": STRINGS,
    "template": fields(("spec",), metadata={"type": "object"}, spec={"type": "object", "required": ["containers"]}),
}
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion={"type": "string"},
    suspend={"type": "boolean"},
    enableInTreeAutoscaling={"type": "boolean"},
    headServiceAnnotations=STRINGS,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    upgradeStrategy=fields(type={"enum": ["Recreate", "None"]}),
    headGroupSpec=fields(("rayStartParams", "template"), serviceType={"type": "string"}, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "rayStartParams", "template"),
            groupName={"type": "string"},
            replicas={"type": "integer"},
            minReplicas={"type": "integer"},
            maxReplicas={"type": "integer"},
            idleTimeoutSeconds={"type": "integer"},
            numOfHosts={"type": "integer"},
            **GROUP,
        ),
    },
)
SPECS = {
    "RayJob": fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        runtimeEnvYAML={"type": "string"},
        metadata=STRINGS,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources={"type": "string"},
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit={"type": "integer"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer"},
        suspend={"type": "boolean"},
        rayClusterSpec=CLUSTER,
    ),
    "RayService": fields(
        ("serveConfigV2", "rayClusterConfig"),
        serveConfigV2={"type": "string"},
        rayClusterDeletionDelaySeconds={"type": "integer", "minimum": 0},
        excludeHeadPodFromServeSvc={"type": "boolean"},
        suspend={"type": "boolean"},
        upgradeStrategy=fields(type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
        rayClusterConfig=CLUSTER,
    ),
}

METRICS = {  # name -> labels that it is asked for by; as Ray exports them: ray_ before each, _total after counters
    "ray_xlstm_ray_tiles_total": {"run"},
    "ray_xlstm_ray_tokens_total": {"run"},
    "ray_xlstm_ray_restarts_total": {"run"},
    "ray_xlstm_ray_memory_events_total": {"run", "limit"},
    "ray_xlstm_ray_tokens_per_second": {"run"},
    "ray_xlstm_ray_prompt_tokens": {"run"},
    "ray_xlstm_ray_prompt_tokens_left": {"run"},
    "ray_xlstm_ray_queue_depth": {"run"},
    "ray_xlstm_ray_actor_memory_bytes": {"run", "actor", "kind"},
    "ray_xlstm_ray_tile_seconds_bucket": {"run", "le"},
}
SERVED = "xlstm:"  # what a service tells itself; tests/serve/test_figures.py asks one


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def options(*commands: str) -> set[str]:
    """Every option that these commands of xlstm-ray know."""
    group = typer.main.get_command(app)
    return {flag for name in commands for p in group.commands[name].params for flag in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]


# In a process of its own: tests that connect to Ray must be the first to import it.
LAUNCHER = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
validate_config(prepare_config(yaml.safe_load(sys.stdin)))
print(json.dumps([flag for parameter in start.params for flag in parameter.opts]))
"""


def launcher(config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Ray's cluster launcher reads this file; on stdout are the options of `ray start`."""
    text = yaml.safe_dump(config)
    return subprocess.run([sys.executable, "-c", LAUNCHER], input=text, capture_output=True, text=True, timeout=60)


# On CI a missing Ray is a failure and not a reason to skip.
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
@pytest.mark.parametrize("name", ["macs.yaml", "gpus.yaml"])
def test_cluster_files_are_what_rays_launcher_takes(name: str) -> None:
    config = document(name)
    taken = launcher(config)
    assert taken.returncode == 0, taken.stderr
    assert "'setup_comands' was unexpected" in launcher({**config, "setup_comands": []}).stderr
    known = set(json.loads(taken.stdout))
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "RAY_AUTH_MODE=token" in command
        assert set(re.findall(r"(--[a-z-]+)", command)) <= known
        assert "ray stop" not in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"][0]


def test_every_mac_of_the_cluster_has_one_gpu_and_the_network() -> None:
    config = document("macs.yaml")
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        (resources,) = re.findall(r"--resources='([^']+)'", command)
        assert json.loads(resources) == {"mps": 1}
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1" in command


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_kubernetes_files_are_what_kuberay_takes(name: str) -> None:
    found = document(name)
    assert found["apiVersion"] == "ray.io/v1"
    spec = found["spec"]
    jsonschema.validate(spec, SPECS[found["kind"]])
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]
    gpus = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in cluster["workerGroupSpecs"]]
    assert all(limits["nvidia.com/gpu"] == 1 for limits in gpus)


def test_the_job_asks_for_as_many_stages_as_there_are_gpus() -> None:
    spec = document("rayjob.yaml")["spec"]
    (stages,) = re.findall(r"--stages (\d+)", spec["entrypoint"])
    assert int(stages) == sum(group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"])
    assert spec["submissionMode"] == "HTTPMode"
    assert '--ray-address "$RAY_ADDRESS"' in spec["entrypoint"]
    assert set(re.findall(r"--[a-z-]+", spec["entrypoint"])) <= options("prefill")


def test_the_service_names_an_app_that_is_there() -> None:
    spec = document("rayservice.yaml")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, function = application["import_path"].split(":")
    source = ast.parse((DEPLOY / f"{module}.py").read_text())
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    known = {
        n.target.id for n in classes["Options"].body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    assert set(application["args"]) <= known
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert any(application["args"]["model"].startswith(f"{m['mountPath']}/") for m in head["volumeMounts"])
    worker = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert application["args"]["replicas"] * application["args"]["num_gpus"] == worker["replicas"]
    assert application["args"]["num_cpus"] < int(
        worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )
    mounts = [m["mountPath"] for m in worker["template"]["spec"]["containers"][0]["volumeMounts"]]
    for path in (application["args"]["model"], application["args"]["token_file"]):
        assert any(path.startswith(f"{mount}/") for mount in mounts)


SERVED_BY = """
import sys
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
import yaml
config = yaml.safe_load(sys.stdin)
ServeDeploySchema.model_validate(config)
unknown = [name for one in config["applications"] for name in one if name not in ServeApplicationSchema.model_fields]
assert not unknown, unknown  # which Serve would pass over
sys.path.insert(0, sys.argv[1])
import serve_app
print(serve_app.Options.model_validate(yaml.safe_load(sys.argv[2])).model_dump_json())
"""


def served_by(config: str, args: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Ray Serve's schema takes this configuration, and the app these arguments; on stdout is what it makes of them."""
    command = [sys.executable, "-c", SERVED_BY, str(DEPLOY), yaml.safe_dump(args)]
    return subprocess.run(command, input=config, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
def test_the_services_configuration_is_what_serve_and_the_app_take() -> None:
    """tests/serve/test_service_on_ray.py runs it, by `serve run`."""
    config = document("rayservice.yaml")["spec"]["serveConfigV2"]
    (application,) = yaml.safe_load(config)["applications"]
    taken = served_by(config, application["args"])
    assert taken.returncode == 0, taken.stderr
    assert json.loads(taken.stdout) | application["args"] == json.loads(taken.stdout)
    assert "['routes']" in served_by(config.replace("route_prefix:", "routes:"), {}).stderr
    assert "replica\n" in served_by(config, {**application["args"], "replica": 2}).stderr
    twice = served_by(config, {**application["args"], "settings": {"states_mb": 1}}).stderr
    assert "states_mb is an argument of its own" in twice


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert lines[0][0] == "ARG"
    assert {word for word, _ in lines} <= {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}
    allowed = {line[1:] for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]}
    assert copied == allowed  # the ignore file keeps everything else out
    users = [rest for word, rest in lines if word == "USER"]
    assert users == ["1000:1000"]
    assert [word for word, _ in lines][-1] == "CMD"
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"/build\[([\w,]+)\]", text)[0].split(",")) <= set(project["optional-dependencies"])


def test_units_call_commands_that_exist(tmp_path: Path) -> None:
    plist = plistlib.loads((DEPLOY / "dev.xlstm-ray.up.plist").read_bytes())
    assert plist["Label"] == "dev.xlstm-ray.up"
    assert plist["AbandonProcessGroup"] is True
    unit = (DEPLOY / "xlstm-ray-up.service").read_text()
    started = re.search(r"^ExecStart=%h/.local/bin/xlstm-ray up (.*)$", unit, re.MULTILINE)
    assert started is not None
    assert re.search(r"^ExecStop=%h/.local/bin/xlstm-ray down$", unit, re.MULTILINE)
    for line in (started[1], plist["ProgramArguments"][-1].partition(" up ")[2]):
        assert set(re.findall(r"--[a-z-]+", line)) <= options("up")
        assert "--ray-metrics-port 44200" in line  # where prometheus.yaml looks

    analyze = shutil.which("systemd-analyze")
    if analyze is not None:  # Linux with systemd
        program = tmp_path / ".local" / "bin" / "xlstm-ray"
        program.parent.mkdir(parents=True)
        program.symlink_to("/bin/true")
        done = subprocess.run(
            [analyze, "verify", "--user", DEPLOY / "xlstm-ray-up.service"],
            env={**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_reads_where_the_heads_write() -> None:
    config = document("prometheus.yaml")
    up, cluster, service = config["scrape_configs"]
    port = inspect.signature(serve).parameters["port"].default
    assert service["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert up["static_configs"] == [{"targets": ["127.0.0.1:44200"]}]
    assert cluster["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    for name in ("macs.yaml", "gpus.yaml"):  # Ray's default folder is where that file is
        assert "--temp-dir" not in (DEPLOY / name).read_text()


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Read and written by Grafana's own classes: they would drop an unknown field."""
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    register_default_plugins()
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))

    def lost(given: Any, known: Any, at: str) -> list[str]:
        if isinstance(given, dict) and isinstance(known, dict):
            return [where for name, value in given.items() for where in lost(value, known.get(name), f"{at}.{name}")]
        if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
            return [where for n, value in enumerate(given) for where in lost(value, known[n], f"{at}[{n}]")]
        return [] if given == known else [at]

    assert lost(dashboard, known, "dashboard") == []


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    names: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            labels = {m.name for m in node.matchers.matchers}
            if node.name.startswith(SERVED):
                assert labels == {"model_name"}
                return
            assert labels <= METRICS[node.name], node.name
            assert "run" in labels
            names.add(node.name)
        elif isinstance(node, promql_parser.AggregateExpr):
            grouped.update(node.modifier.labels)
            walk(node.expr)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                walk(argument)
        elif isinstance(node, promql_parser.MatrixSelector):
            walk(node.vector_selector)
        elif isinstance(node, promql_parser.BinaryExpr):
            walk(node.lhs)
            walk(node.rhs)
        else:
            assert isinstance(node, promql_parser.NumberLiteral), type(node)

    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):  # a row has none
            grouped: set[str] = set()
            walk(promql_parser.parse(target["expr"].replace("$__rate_interval", "1m")))
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= grouped  # a label that is summed away would be empty in the legend
    assert names == set(METRICS)
    cells = [
        (p["gridPos"]["x"] + x, p["gridPos"]["y"] + y)
        for p in dashboard["panels"]
        for x in range(p["gridPos"]["w"])
        for y in range(p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # panels do not overlap
    assert max(x for x, _ in cells) < 24


def test_the_runbook_names_commands_and_options_that_exist() -> None:
    text = (DEPLOY / "RUNBOOK.md").read_text().replace("\\\n", "")
    spans = re.findall(r"`([^`\n]+)`", text) + [line for line in text.splitlines() if line.startswith("    ")]
    spans = [span for span in spans if "RUN" not in span]  # names of actors, which begin like commands
    calls = [call for span in spans for call in re.findall(r"(?:^|[ /(])xlstm-ray ([a-z]+)\b([^#]*)", span)]
    assert {command for command, _ in calls} >= {"up", "status", "down", "prefill", "doctor"}
    for command, rest in calls:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options(command), (command, rest)
    assert set(re.findall(r"ray_xlstm_ray_\w+", text)) | {"ray_xlstm_ray_tile_seconds_bucket"} >= set(METRICS)
    assert set(re.findall(r"`?deploy/([\w.-]+\w)`?", text)) <= {path.name for path in DEPLOY.iterdir()}
    titles = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
