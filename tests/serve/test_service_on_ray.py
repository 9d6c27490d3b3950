"""The service with its model in actors on Ray, and with replicas of it: real heads, processes and signals."""

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from string import ascii_letters
from typing import Any

import programs
import psutil
import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from services import WORDS, Client, Here, Running, model, serving, serving_here

from xlstm_ray import RecurrentState
from xlstm_ray.supervisor.ports import free_port
from xlstm_ray.supervisor.presence import LOOK_S
from xlstm_ray.supervisor.records import Head
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.status import status
from xlstm_ray.supervisor.stop import stop_head

__all__ = ["model"]

SIZES = "--device cpu --dtype float32 --tile-size 32 --chunk-size 16".split()
PROMPTS = "The capital of France is", "a" * 150, "b" * 150


def chosen(client: Client, prompt: str, **fields: Any) -> dict[str, Any]:
    """The tokens of a greedy answer, and their log-probabilities."""
    (choice,) = client.complete(prompt, max_tokens=6, logprobs=0, **fields).json["choices"]
    return {name: choice["logprobs"][name] for name in ("tokens", "token_logprobs")}


def like(said: dict[str, Any]) -> dict[str, Any]:
    """The same within rounding."""
    return {**said, "token_logprobs": pytest.approx(said["token_logprobs"], abs=1e-4)}


def state_dir(home: Path) -> Path:
    return home / ".local" / "state" / "xlstm-ray"


def test_on_a_grid_answers_are_those_of_this_process_and_outlive_an_actor(model, tmp_path):
    with serving_here(model, settings={"dtype": "float32"}) as here:
        alone = {prompt: like(chosen(here, prompt)) for prompt in PROMPTS}
    grid = ["--chunkwise-backend", "ray_compiled_steps", "--no-ray-local-mode", "--stages", 2, "--slots", 2]
    plain = {"HOME": str(tmp_path), "TORCHDYNAMO_DISABLE": "1"}  # compiled actors are tested elsewhere
    with serving("--model", model, *SIZES, *grid, "--cache-memory-mb", 64, **plain) as service:
        for prompt in PROMPTS:
            assert chosen(service, prompt) == alone[prompt]
        assert service.complete(PROMPTS[1]).headers["x-xlstm-cache"].startswith("hit tokens=150 of=150")
        service.ask("/v1/states", {"id": "doc", "prompt": PROMPTS[2][:100]})
        while service.ask("/v1/states/doc").json["status"] != "ready":
            pass
        assert chosen(service, PROMPTS[2][100:], state="doc") == alone[PROMPTS[2]]
        (head,) = status(state_dir(tmp_path)).heads
        stream = service.send("/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 300, "stream": True})
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        os.kill(next(actor.pid for actor in head.actors if "Shard" in actor.name), signal.SIGKILL)
        assert b"".join(iter(lambda: stream.recv(1 << 16), b"")).count(b"[DONE]") == 1
        for prompt in PROMPTS:
            assert chosen(service, prompt) == alone[prompt]
        assert chosen(service, PROMPTS[2][100:], state="doc") == alone[PROMPTS[2]]
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
    assert not status(state_dir(tmp_path)).heads


# -- replicas ----------------------------------------------------------------------------------------------------------
CACHE = "--cache-memory-mb", 64
# Serve passes a replica over that does not say within 0.1 s whether it has room: on a busy machine any may be late.
PATIENT = dict.fromkeys(
    ("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"), "20"
)
KEY = "a-key-of-those-who-ask"
ROOT = Path(__file__).parents[2]


def service_yaml() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    """A head that is there already, as `xlstm-ray up` starts it, with the variables that rayservice.yaml has."""
    options = HeadOptions(state_dir=state_dir(home), stays=True, num_cpus=4, object_store_bytes=100 << 20)
    pod = service_yaml()["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    with pytest.MonkeyPatch.context() as patch:
        for one in pod["containers"][0]["env"]:
            patch.setenv(one["name"], one["value"])
        started = start_head(options)
    yield started
    stop_head(started, state_dir(home))


@pytest.fixture(scope="module")
def here(model: Path) -> Iterator[Here]:
    """The same model in this process."""
    with serving_here(model, slots=16, settings={"cache_memory_mb": 64}) as service:
        yield service


def on(head: Head, home: Path, model: Path, *words: object) -> Any:
    sizes = ["--model", model, "--served-name", "tiny", *WORDS, *CACHE, "--threads", 1]
    return serving(*sizes, "--ray-address", head.address, *words, HOME=str(home), **PATIENT)


@pytest.fixture(scope="module")
def two(head: Head, home: Path, model: Path) -> Iterator[Running]:
    with on(head, home, model, "--replicas", 2) as service:
        yield service
        assert service.end() == 0
    (item,) = status(state_dir(home)).heads
    assert not [actor for actor in item.actors if "Serve" in actor.name]  # the head is somebody's, and as it was


def replicas(home: Path) -> list[int]:
    """The processes of all replicas."""
    return [a.pid for item in status(state_dir(home)).heads for a in item.actors if "ServeReplica" in a.name]


def text_of(client: Client, body: dict[str, Any]) -> str:
    """What a stream says."""
    events = client.ask("/v1/completions", body).events
    return "".join(choice["text"] for event in events for choice in event["choices"])


def both_say(one: Client, other: Client, path: str, body: dict[str, Any]) -> Any:
    """What both answer, without what is of one reply alone."""
    said = []
    for client in (one, other):
        got = client.ask(path, body)
        found = got.events if body.get("stream") else [got.json]
        for part in found:
            part.pop("id", None)
            part.pop("created", None)
            part.pop("usage", None)
        said.append((got.status, found))
    assert said[0] == said[1]
    return said[0]


def require_turns(client: Client) -> None:
    """A prompt goes where its beginning was read, and new ones to both replicas."""
    went: dict[str, set[str]] = {}
    for n in range(3):
        for document in "defg":
            got = client.complete(document * 96 + str(n), max_tokens=1)
            went.setdefault(document, set()).add(got.headers["x-xlstm-replica"])
            assert got.headers["x-xlstm-cache"].startswith("hit tokens=96 of=97" if n else "miss")
    assert [len(found) for found in went.values()] == [1, 1, 1, 1]
    assert len(set.union(*went.values())) == 2  # new ones take turns


# -- behind Serve's proxy, with replicas of two kinds ------------------------------------------------------------------
@pytest.fixture
def behind_a_proxy(head: Head, model: Path, tmp_path: Path) -> Iterator[Client]:
    """`serve run` with the configuration of rayservice.yaml, but for this machine.

    A head has one Serve, so this comes before `two`, whose Serve has no proxy.
    """
    (tmp_path / "keys").write_text(f"{KEY}\n")
    config = yaml.safe_load(service_yaml()["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    sizes = {"tile_size": 32, "chunk_size": 16, "chunkwise_backend": "native", "cache_memory_mb": 64, "threads": 1}
    own = {"model": str(model), "name": "tiny", "device": "cpu", "token_file": str(tmp_path / "keys"), "num_cpus": 1}
    kinds = {"num_gpus": 0, "replicas": 2, "decoders": 1, "max_stall_ms": 60_000, "states_mb": 64}
    application["args"] |= own | kinds | {"settings": sizes}
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": f"{ROOT / 'deploy'}:{ROOT}"}}  # where the image has it
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": free_port()}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = "from ray.serve.scripts import cli; cli()"
    words = ["run", str(tmp_path / "config.yaml"), "--address", str(head.address)]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.token_path)}
    env = {**os.environ, **token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen([sys.executable, "-c", run, *words], stdout=said, stderr=said, env=env)
        with process:
            client = Client(f"http://127.0.0.1:{config['http_options']['port']}", authorization=f"Bearer {KEY}")
            while not answers(client):
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.2)
            yield client
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def answers(client: Client) -> bool:
    """Whether the service takes requests; as long as Serve starts it, nobody listens, or the proxy says 404 or 503."""
    try:
        return client.ask("/health").status == 200
    except OSError:
        return False


def test_a_state_goes_from_who_reads_to_who_answers(here, behind_a_proxy, home):
    actors = [actor for item in status(state_dir(home)).heads for actor in item.actors]
    (proxy,) = [psutil.Process(actor.pid) for actor in actors if "Proxy" in actor.name]
    assert proxy.environ()["RAY_SERVE_PROXY_USE_GRPC"] == "1"
    assert Client(behind_a_proxy.url).ask("/v1/models").status == 401
    for fields in ({}, {"logprobs": 2}, {"temperature": 1, "seed": 7, "n": 3}, {"repetition_penalty": 1.4}):
        body = {"prompt": "k" * 150, "max_tokens": 12, "temperature": 0, **fields}
        both_say(here, behind_a_proxy, "/v1/completions", body)
    both_say(
        here, behind_a_proxy, "/v1/completions", {"prompt": "k" * 99, "echo": True, "logprobs": 1, "max_tokens": 0}
    )
    both_say(here, behind_a_proxy, "/v1/completions", {"prompt": [100_000], "max_tokens": 12})
    got = behind_a_proxy.complete("k" * 150, max_tokens=3)
    assert got.headers["x-xlstm-cache"].startswith("hit tokens=150 of=150")
    usage = got.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (150, 3)
    assert behind_a_proxy.ask("/load").json["documents"]["most"] == 64 << 20
    behind_a_proxy.ask("/v1/states", {"id": "doc", "prompt": "h" * 300})
    while behind_a_proxy.ask("/v1/states/doc").json["status"] != "ready":
        time.sleep(0.05)
    here.ask("/v1/states", {"id": "same", "prompt": "h" * 300})
    while here.ask("/v1/states/same").json["status"] != "ready":
        time.sleep(0.05)
    assert chosen(behind_a_proxy, "why?", state="doc") == chosen(here, "why?", state="same")
    stream = {"prompt": "l" * 200, "max_tokens": 20, "temperature": 0, "stream": True}
    assert text_of(behind_a_proxy, stream) == text_of(here, stream)
    require_turns(behind_a_proxy)


# -- in front of replicas ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 7, "n": 3},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 1},
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 0, "stop": ["\r"]},
        {"temperature": 0, "prompt": [3] * 40},
        {"temperature": 0, "prompt": ["a" * 70, "b" * 5]},
        {"prompt": [100_000]},
        {"prompt": []},
        {"state": "none"},
        {"model": "another"},
        {"best_of": 2},
        {"temperature": 0, "logit_bias": {"99999": 1}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_replicas_answer_as_the_engine_in_this_process(here, two, fields):
    both_say(here, two, "/v1/completions", {"prompt": "a prompt " * 20, "max_tokens": 12, **fields})


def test_a_stream_of_a_replica_has_the_same_text(here, two):
    def text(client: Client) -> str:
        body = {"prompt": "c" * 200, "max_tokens": 40, "temperature": 0, "stream": True}
        return "".join(
            choice["text"] for event in client.ask("/v1/completions", body).events for choice in event["choices"]
        )

    assert text(two) == text(here)


def test_a_prompt_goes_where_its_beginning_was_read(two):
    require_turns(two)


def test_documents_are_asked_at_any_replica(here, two, tmp_path):
    for client in (here, two):
        client.ask("/v1/states", {"id": "doc", "prompt": "h" * 300})
        while client.ask("/v1/states/doc").json["status"] != "ready":
            time.sleep(0.05)
        (tmp_path / "state").write_bytes(client.ask("/v1/states/doc/file").body)
        client.digest = RecurrentState.load(tmp_path / "state").digest()
    assert two.digest == here.digest
    assert chosen(two, "why?", state="doc") == chosen(here, "why?", state="doc")
    got = two.complete("why?", state="doc")
    assert got.headers["x-xlstm-cache"].startswith("state tokens=300 of=304")
    assert two.ask("/v1/states/up", (tmp_path / "state").read_bytes(), method="PUT").status == 201
    assert chosen(two, "why?", state="up") == chosen(here, "why?", state="doc")
    two.ask("/v1/states", {"id": "long", "prompt": "i" * 200_000})
    while not two.ask("/v1/states/long").json["tokens_done"]:
        time.sleep(0.01)
    stopped = two.ask("/v1/states/long/cancel", b"").json
    assert stopped["status"] == "cancelled"
    assert 0 < stopped["tokens_done"] < 200_000
    assert stopped["tokens_done"] % 32 == 0


def test_a_state_moves_to_another_replica_where_its_own_is_much_busier(here, two):
    """From each of the two: a replica may not take any other for the one that it is to ask."""
    letters = iter(ascii_letters)
    document = f"{next(letters)}~" * 2_000
    names = [two.complete(document, max_tokens=1).headers["x-xlstm-replica"]]
    while len(names) < 2:  # new ones take turns, but for what is still under way
        document = f"{next(letters)}~" * 2_000
        names += {two.complete(document, max_tokens=1).headers["x-xlstm-replica"]} - {*names}
    for first in names:
        for _ in range(6):  # where a fetch was slow, states are computed again for a time: on a busy machine
            while two.complete(document, max_tokens=1).headers["x-xlstm-replica"] != first:
                document = f"{next(letters)}~" * 2_000
            known = crowded_out(here, two, first, document)
            document = f"{next(letters)}~" * 2_000
            if known.startswith("hit tokens=4000 of=4003 tier=replica"):
                break
            assert known.startswith("miss ")
        else:
            pytest.fail(f"no state was fetched from {first}: {known}")


def crowded_out(here: Client, two: Client, first: str, document: str) -> str:
    """Answers about a document that `first` has read, until the other one gives one; what that knew of it."""
    streams, said = [], []
    fields = {"max_tokens": 4000, "temperature": 0, "logprobs": 0, "stream": True}
    for n in range(100, 120):  # five are enough where nothing else is under way at the other one
        streams.append(two.send("/v1/completions", {"prompt": f"{document}{n}", **fields}))
        reply = HTTPResponse(streams[-1])
        reply.begin()  # it is under way
        if reply.headers["x-xlstm-replica"] != first:
            break
    assert reply.headers["x-xlstm-replica"] != first
    for stream in streams[:-1]:
        stream.close()
    while len(said) < 6:
        if (line := reply.readline()).startswith(b"data: "):
            (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
            said += choice["logprobs"]["tokens"]
    reply.close()
    streams[-1].close()
    assert said[:6] == chosen(here, f"{document}{n}")["tokens"]
    assert two.complete(f"{document}!", max_tokens=1).headers["x-xlstm-cache"].startswith("hit tokens=4000 ")
    return reply.headers["x-xlstm-cache"]


def test_a_replica_that_is_killed_under_load_costs_no_answer(here, two, home):
    prompts = [f"{n} " * 30 for n in range(12)]
    alone = {prompt: here.complete(prompt, max_tokens=60).json["choices"][0]["text"] for prompt in prompts}
    client = OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=10)
    got: list[tuple[str, str]] = []
    end = threading.Event()

    def ask(first: int) -> None:
        n = first
        while not end.is_set():
            prompt = prompts[n % len(prompts)]
            reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=60, temperature=0)
            got.append((prompt, reply.choices[0].text))
            n += 1

    callers = [threading.Thread(target=ask, args=[n]) for n in range(6)]
    for caller in callers:
        caller.start()
    while len(got) < 12:
        time.sleep(0.02)
    before, told = replicas(home), set(figures(two, "xlstm:snapshots"))
    os.kill(before[0], signal.SIGKILL)
    then = len(got)
    while len(got) < then + 24:
        time.sleep(0.02)
    end.set()
    for caller in callers:
        caller.join()
    assert all(text == alone[prompt] for prompt, text in got)
    while len(now := replicas(home)) < 2 or before[0] in now:  # Serve has started another
        time.sleep(0.2)
    while len(there := set(figures(two, "xlstm:snapshots"))) != 2 or there == told:  # whose figures are told instead
        time.sleep(0.2)


def test_serve_calls_replicas_in_their_loop_alone():
    """Serve calls a plain method in a thread: a cancel there has met a request that looked at the same deque."""
    (replica,) = [
        node
        for node in ast.parse((ROOT / "xlstm_ray" / "serve" / "replica.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Replica"
    ]
    plain = [node.name for node in replica.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert plain == []


def figures(client: Client, name: str, **labels: str) -> dict[str, float]:
    """The values of a figure by replica."""
    families = text_string_to_metric_families(client.ask("/metrics").body.decode())
    found = [one for family in families for one in family.samples if one.name == name]
    return {one.labels["replica"]: one.value for one in found if labels.items() <= one.labels.items()}


def test_replicas_tell_their_figures(two):
    def told() -> list[dict[str, float]]:
        steps = [figures(two, "xlstm:step_seconds_count", kind=kind) for kind in ("prefill", "decode")]
        names = "xlstm:stall_seconds_count", "xlstm:snapshot_seconds_count", "xlstm:snapshots"
        return [*steps, *(figures(two, name) for name in names)]

    time.sleep(2 * LOOK_S)  # those of other tests may be to come
    while len((before := told())[0]) < 2:
        time.sleep(0.1)
    got = two.complete("n" * 320, max_tokens=30, ignore_eos=True)
    mine = got.headers["x-xlstm-replica"]
    while (now := told())[1][mine] < before[1][mine] + 29:  # the first token is of the prompt's last window
        time.sleep(0.1)
    now = told()  # each of its parts was asked for by itself, and the first ones may have been older
    assert now[0][mine] >= before[0][mine] + 10
    assert all(now[n][mine] > before[n][mine] for n in (2, 3, 4))
    assert figures(two, "xlstm:snapshot_bytes", tier="memory")[mine] > 0
    assert figures(two, "xlstm:evictions_total", tier="memory").keys() == set(now[0])
    (other,) = set(now[0]) - {mine}
    assert [part[other] for part in now] == [part[other] for part in before]
    cache = two.ask("/load").json["cache"]
    assert cache["states"] == sum(figures(two, "xlstm:snapshots").values())


def test_a_stall_that_no_tile_keeps_is_refused_by_what_a_replicas_place_measures(head, home, model):
    sizes = ["--model", model, *WORDS, "--ray-address", head.address, "--replicas", 2, "--max-stall-ms", "0.001"]
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", *map(str, sizes)]
    ran = programs.run(command, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: --max-stall-ms is 0.001, and --tile-size 32 takes ")


def test_a_reader_that_leaves_ends_its_request_at_the_replica(two):
    stream = two.send("/v1/completions", {"prompt": "j" * 500_000, "max_tokens": 5, "stream": True})
    running = 'num_requests_running{model_name="tiny"} %d.0'
    for number in (1, 0):
        while running % number not in two.ask("/metrics").body.decode():
            time.sleep(0.05)
        stream.close()
    assert 'cancelled_total{model_name="tiny",phase="prefill"}' in two.ask("/metrics").body.decode()
