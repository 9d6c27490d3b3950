"""A text of any size for a replica on Ray Serve: it travels in parcels, and neither end holds it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from services import WORDS, serving
from test_documents import told, until
from test_large_documents import MIB, digest, info, peak, send
from test_service_on_ray import replicas
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers

LARGE = 32  # MiB
PARCELS = 9  # MiB: three of them
NAMES = [f"{n:0511d}" for n in range(250)]  # words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word is a token, so that a large text has few."""
    directory = tmp_path_factory.mktemp("words")
    make_model(directory, hidden_size=64, num_hidden_layers=1, num_heads=1, eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {name: n for n, name in enumerate(NAMES, 1)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def text(size: int) -> Iterator[bytes]:
    """Words, some at a time."""
    for n in range(size // MIB):
        yield "".join(f"{NAMES[(n * 7 + m * m) % len(NAMES)]} " for m in range(MIB // 512)).encode()


class Process(NamedTuple):
    """One that somebody else has started."""

    pid: int


class Watched(NamedTuple):
    process: Process


def test_a_large_text_goes_to_a_replica_in_parcels(model, tmp_path, run):
    plain = ["--model", model, *WORDS, "--tile-size", 512, "--chunk-size", 64, "--threads", 1]
    (tmp_path / "text").write_bytes(b"".join(text(PARCELS * MIB)))
    alone = json.loads(run("prefill", *plain, "-f", tmp_path / "text", "--json").out)
    assert alone["prompt_tokens"] == PARCELS * MIB // 512
    with serving(*plain, "--replicas", 1, HOME=str(tmp_path)) as service:
        assert send(service, "/v1/states?id=book", text(PARCELS * MIB))[0] == 202
        last = told(service, "book")[-1]
        assert (last["status"], last["tokens_total"]) == ("ready", alone["prompt_tokens"])
        assert digest(service.ask("/v1/states/book/file").body) == alone["state_digest"]
        (replica,) = [Watched(Process(pid)) for pid in replicas(tmp_path)]
        before = [peak(one) for one in (service, replica)]
        assert send(service, "/v1/states?id=large", text(LARGE * MIB))[0] == 202
        until(lambda: info(service, "large")["tokens_done"], seconds=300)
        assert info(service, "large")["tokens_total"] == LARGE * MIB // 512
        grown = [peak(one) - was for one, was in zip((service, replica), before, strict=True)]
        assert max(grown) < LARGE * MIB * 3 / 4, grown
        service.ask("/v1/states/large", method="DELETE")
        assert service.end() == 0
