"""A text of any size for a replica on Ray Serve: it travels in parcels, and neither end holds it."""

import json
from typing import NamedTuple

from services import WORDS, serving
from test_documents import told, until
from test_large_documents import MIB, digest, info, model, peak, send, text
from test_service_on_ray import replicas

__all__ = ["model"]

LARGE = 64  # MiB; what travels and is cut takes 30 at a time
PARCELS = 9  # MiB: three of them


class Process(NamedTuple):
    """One that somebody else has started."""

    pid: int


class Watched(NamedTuple):
    process: Process


def test_a_large_text_goes_to_a_replica_in_parcels(model, tmp_path, run):
    plain = ["--model", model, *WORDS, "--tile-size", 512, "--chunk-size", 64, "--threads", 1]
    (tmp_path / "text").write_bytes(b"".join(text(PARCELS * MIB)))
    alone = json.loads(run("prefill", *plain, "-f", tmp_path / "text", "--json").out)
    assert alone["prompt_tokens"] == PARCELS * (MIB // 120)
    with serving(*plain, "--replicas", 1, HOME=str(tmp_path)) as service:
        assert send(service, "/v1/states?id=book", text(PARCELS * MIB))[0] == 202
        last = told(service, "book")[-1]
        assert (last["status"], last["tokens_total"]) == ("ready", alone["prompt_tokens"])
        assert digest(service.ask("/v1/states/book/file").body) == alone["state_digest"]
        (replica,) = [Watched(Process(pid)) for pid in replicas(tmp_path)]
        before = [peak(one) for one in (service, replica)]
        assert send(service, "/v1/states?id=large", text(LARGE * MIB))[0] == 202
        until(lambda: info(service, "large")["tokens_done"], seconds=300)
        assert info(service, "large")["tokens_total"] == LARGE * (MIB // 120)
        grown = [peak(one) - was for one, was in zip((service, replica), before, strict=True)]
        assert max(grown) < LARGE * MIB * 3 / 4, grown
        service.ask("/v1/states/large", method="DELETE")
        assert service.end() == 0
