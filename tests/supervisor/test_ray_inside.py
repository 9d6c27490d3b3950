"""What we use of Ray's inner parts is there, and has the shape that we use. A Ray that changed it fails here first."""

import inspect

import pytest

pytest.importorskip("ray")
import ray
from ray._private import worker

from xlstm_ray.supervisor.ray_inside import job_config

SOURCE = inspect.getsource(worker)


def test_messages_of_the_cluster_go_through_one_function_that_can_be_replaced():
    assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
    uses = SOURCE.count("print_to_stdstream") - SOURCE.count("def print_to_stdstream")
    assert uses
    assert "import print_to_stdstream" not in SOURCE  # looked up by this module's name when a message comes


def test_shutdown_is_what_ray_does_at_exit():
    assert callable(worker.shutdown)
    assert "atexit.register(shutdown" in SOURCE


def test_a_job_says_where_its_workers_import_from():
    wanted = job_config(ray, {"job_name": "a"}, ["/b"])
    sent = wanted._get_proto_job_config()
    assert dict(sent.metadata)["job_name"] == "a"
    assert list(sent.py_driver_sys_path) == ["/b"]
    plain = ray.job_config.JobConfig()
    assert (plain._client_job, wanted._client_job) == (False, True)
    assert (
        "not job_config._client_job and not job_config._runtime_env_has_working_dir()" in SOURCE
    )  # the current folder
