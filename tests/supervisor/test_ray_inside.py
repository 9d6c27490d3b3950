"""The inner parts of Ray that we use are there, with the shape that we use. A Ray that changes them fails here first.

Ray is imported in a process of its own: it reads its environment then, and other tests of this process start heads.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

ASK = """
import inspect, json, ray
from ray._private import state, worker
from xlstm_ray.supervisor.ray_inside import job_config, session_dir

wanted, plain = job_config(ray, {"job_name": "a"}, ["/b"]), ray.job_config.JobConfig()
sent = wanted._get_proto_job_config()
print(json.dumps({
    "source": inspect.getsource(worker),
    "parameters": list(inspect.signature(worker.print_to_stdstream).parameters),
    "shutdown": callable(worker.shutdown),
    "job": [dict(sent.metadata)["job_name"], list(sent.py_driver_sys_path)],
    "client": [plain._client_job, wanted._client_job],
    "unconnected": session_dir() is None,
    "jobs": inspect.getsource(state),
    "folder": callable(ray._private.node.Node.get_session_dir_path),
}))
"""


@pytest.fixture(scope="module")
def inside() -> dict[str, Any]:
    ran = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_messages_of_the_cluster_go_through_one_function_that_can_be_replaced(inside):
    assert inside["parameters"] == ["data", "ignore_prefix"]
    assert inside["source"].count("print_to_stdstream") > inside["source"].count("def print_to_stdstream")
    assert "import print_to_stdstream" not in inside["source"]  # looked up by its module's name when a message comes


def test_the_folder_of_a_session_is_known_once_connected(inside):
    assert inside["unconnected"]
    assert inside["folder"]


def test_shutdown_is_what_ray_does_at_exit(inside):
    assert inside["shutdown"]
    assert "atexit.register(shutdown" in inside["source"]


def test_a_job_says_where_its_workers_import_from(inside):
    assert inside["job"] == ["a", ["/b"]]
    assert inside["client"] == [False, True]
    current_folder = "not job_config._client_job and not job_config._runtime_env_has_working_dir()"
    assert current_folder in inside["source"]


def test_a_table_says_which_jobs_have_ended(inside):
    assert "def jobs()" in inside["jobs"]
    assert 'job_info["JobID"] = entry.job_id.hex()' in inside["jobs"]
    assert 'job_info["IsDead"] = entry.is_dead' in inside["jobs"]
