"""A text of any size for a replica on Ray Serve: it travels in parcels, and neither end holds it."""

import json

import psutil
from services import serving
from test_documents import told, until
from test_large_documents import MIB, digest, info, model, peak, send, text
from test_service_on_ray import replicas

__all__ = ["model"]

SIZES = "--device cpu --tile-size 512 --chunk-size 64 --chunkwise-backend queued_compiled_chunks".split()
LARGE = 64  # MiB; what travels and is cut takes 30 at a time
PARCELS = 9  # MiB: three of them


def own(process: psutil.Process) -> int:
    """Bytes of memory that are this process's own. The pages of Ray's object store, through which parcels come, are
    mapped one after the other as they are used, but are not."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def test_a_large_text_goes_to_a_replica_in_parcels(model, tmp_path, run, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # 30 times as fast as native, and nothing is compiled
    plain = ["--model", model, *SIZES, "--threads", 1]
    (tmp_path / "text").write_bytes(b"".join(text(PARCELS * MIB)))
    alone = json.loads(run("prefill", *plain, "-f", tmp_path / "text", "--json").out)
    assert alone["prompt_tokens"] == PARCELS * (MIB // 120)
    with serving(*plain, "--replicas", 1, HOME=str(tmp_path)) as service:
        assert send(service, "/v1/states?id=book", text(PARCELS * MIB))[0] == 202
        last = told(service, "book")[-1]
        assert (last["status"], last["tokens_total"]) == ("ready", alone["prompt_tokens"])
        assert digest(service.ask("/v1/states/book/file").body) == alone["state_digest"]
        (replica,) = map(psutil.Process, replicas(tmp_path))
        before, seen = (peak(service), own(replica)), list[int]()
        assert send(service, "/v1/states?id=large", text(LARGE * MIB))[0] == 202
        until(lambda: seen.append(own(replica)) or info(service, "large")["tokens_done"], seconds=300)
        assert info(service, "large")["tokens_total"] == LARGE * (MIB // 120)
        grown = [now - was for now, was in zip((peak(service), max(seen)), before, strict=True)]
        assert max(grown) < LARGE * MIB * 3 / 4, grown
        service.ask("/v1/states/large", method="DELETE")
        assert service.end() == 0
