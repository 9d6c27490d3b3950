"""The scripts of the demo model, with a tiny corpus and a model that is trained for seconds."""

import json
import math
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import xLSTMForCausalLM

import xlstm_ray
from xlstm_ray.config import ModelConfig

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
VOCABULARY = 300


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The modules of scripts/demo, on the path, as when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMO)
        names = "sources", "corpus", "network", "evaluate", "train"
        yield SimpleNamespace(**{name: import_module(name) for name in names})


# -- the corpus --------------------------------------------------------------------------------------------------------
def wordnet(folder: Path) -> None:
    """Files in WordNet's format: a noun that is used often, one that is an insult, and 600 kinds of the first."""
    folder.mkdir()
    kinds = [f"{n:08} 05 n 01 beast_{n} 0 001 @ 00000001 n 0000 | a beast with {n} spots  " for n in range(1000, 1600)]
    lines = [
        "  1 The licence.  ",
        '00000001 03 n 02 beast 0 animal 0 000 | a living thing; "the beast ate all the grass"  ',
        "00000002 03 n 01 oaf 0 001 @ 00000001 n 0000 | an offensive word for a beast  ",
        *kinds,
    ]
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    (folder / "data.verb").write_text("00000001 30 v 01 graze 0 000 01 + 01 00 | eat grass  \n")
    for name in ("data.adj", "data.adv"):
        (folder / name).write_text("")
    (folder / "cntlist.rev").write_text("beast%1:03:00:: 1 70\n")


def test_the_corpus_of_wordnet_and_geonames_keeps_held_out_meanings_out(demo, tmp_path, capsys):
    wordnet(tmp_path / "wordnet")
    row = {"continentcode": "EU", "currencyname": "Crown", "neighbours": "FR,DE"}
    countries = {iso: {**row, "name": f"Land {iso}", "capital": f"Town {iso}"} for iso in demo.sources.FORTY}
    (tmp_path / "countries.json").write_text(json.dumps(countries))
    out = tmp_path / "corpus"
    words = ["--wordnet", tmp_path / "wordnet", "--countries", tmp_path / "countries.json", "--out", out]
    demo.corpus.main([*map(str, words), "--vocab-size", str(VOCABULARY), "--country-documents", "5"])

    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "corpus.json").read_text())
    assert (report["meanings"], report["meanings_left_out"]) == (603, 1)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = {}
    for kind, counts in report["counts"].items():
        read = demo.corpus.Documents.read(out / f"{kind}.npz")
        assert all(row[0] == 0 for row in read.rows())
        texts[kind] = [tokenizer.decode(row[1:].tolist()) for row in read.rows()]
        assert read.utf8_bytes == sum(len(text.encode()) for text in texts[kind])
        assert counts == {
            "documents": len(texts[kind]),
            "tokens": sum(len(tokenizer.encode(text).ids) for text in texts[kind]),
            "bytes": read.utf8_bytes,
        }
    learned = "\n".join(texts["train"])
    for kind in ("heldout", "development"):
        assert texts[kind]
        assert not [text for text in texts[kind] if text.partition(": ")[2] in learned]
    assert "offensive" not in learned
    assert texts["train"].count('beast (noun): a living thing; "the beast ate all the grass"') == 5  # it is used often
    assert "verb): eat grass" in learned
    assert "is a kind of beast." in learned
    stated = " ".join(texts["capitals"])
    assert all(f"Town {iso}" in stated for iso in demo.sources.FORTY)
    assert [row["forty"] for row in json.loads((out / "capitals.json").read_text())] == [True] * 40


# -- the model ---------------------------------------------------------------------------------------------------------
def toy_corpus(demo: SimpleNamespace, folder: Path) -> None:
    """Sentences of a small grammar, and four capitals."""
    rng = random.Random(0)

    def text(sentences: int) -> str:
        who, what, how = "dog cat horse farmer".split(), "house tree river field".split(), "big old red small".split()
        return " ".join(
            f"The {rng.choice(how)} {rng.choice(who)} sees the {rng.choice(how)} {rng.choice(what)}."
            for _ in range(sentences)
        )

    capitals = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo"}
    documents = {
        "train": [text(3) for _ in range(300)],
        "capitals": [f"The capital of {name} is {capital}." for name, capital in capitals.items()],
        "development": [text(3) for _ in range(6)],
        "heldout": [text(size) for size in (1, 2, 3, 20)],
    }
    asked = [{"name": name, "capital": capital, "forty": True} for name, capital in capitals.items()]
    demo.corpus.write_corpus(folder, documents, asked, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def toy(demo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A corpus folder, the folder of a model trained on it, and the report of the training."""
    corpus, model = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("model")
    toy_corpus(demo, corpus)
    sizes = "--hidden-size 64 --blocks 2 --heads 2 --steps 60 --batch-tokens 1024 --row-lengths 128 256"
    rates = "--lr 1e-2 --warmup 10 --dropout 0.05 --reports 3"
    demo.train.main(["--corpus", str(corpus), "--out", str(model), *sizes.split(), *rates.split()])
    return SimpleNamespace(corpus=corpus, model=model, result=json.loads((model / "evaluation.json").read_text()))


def test_the_loss_of_a_toy_falls_far_below_a_uniform_guess(demo, toy):
    log, training = toy.result["log"], toy.result["training"]
    assert [line["step"] for line in log] == [20, 40, 60]
    assert training["tokens"] == log[-1]["tokens"] == 60 * 1024
    assert training["options"]["row_lengths"] == "[128, 256]"
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["loss"] < math.log(VOCABULARY) / 3
    for kind, found in (
        ("development", log[-1]["development_bits_per_byte"]),
        ("heldout", toy.result["evaluation"][0]["heldout"]["bits_per_byte"]),
    ):
        with np.load(toy.corpus / f"{kind}.npz") as file:
            uniform = math.log2(VOCABULARY) * file["tokens"].size / file["utf8_bytes"].sum()
        assert found < uniform / 3


def test_xlstm_ray_and_transformers_compute_what_was_trained(demo, toy):
    tensors, config = load_file(toy.model / "model.safetensors"), ModelConfig.from_file(toy.model / "config.json")
    with np.load(toy.corpus / "heldout.npz") as file:
        lengths, tokens = file["lengths"].tolist(), file["tokens"].astype(np.int64)
    documents = [[0, *part.tolist()] for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    trained = demo.network.Model.of_tensors(tensors, config, torch.float32)
    oracle = xLSTMForCausalLM.from_pretrained(toy.model, dtype=torch.float32).eval()
    total = 0.0
    with xlstm_ray.load(toy.model, device="cpu", dtype="float32", chunkwise_backend="native") as lm:
        for ids in documents:
            [found] = lm.prefill([ids], all_logits=True).all_logits
            with torch.inference_mode():
                x, _ = trained.hidden(torch.tensor([ids]))
                torch.testing.assert_close(found, trained.logits(x)[0], atol=2e-4, rtol=2e-4)
                theirs = oracle(torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(found, theirs, atol=2e-3, rtol=2e-3)
            total -= found.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
    assert len(documents[-1]) > 3 * config.chunk_size
    heldout = toy.result["evaluation"][0]["heldout"]
    assert heldout["bits_per_byte"] == pytest.approx(total / math.log(2) / heldout["bytes"], rel=1e-4)


def test_evaluation_again_gives_the_same_figures(demo, toy, capsys):
    capsys.readouterr()
    demo.evaluate.main(["--corpus", str(toy.corpus), "--model", str(toy.model), "--dtype", "float32"])
    assert json.loads(capsys.readouterr().out) == toy.result["evaluation"][0]


def test_a_row_longer_than_the_text_is_one_line(demo, toy, tmp_path):
    words = ["--corpus", str(toy.corpus), "--out", str(tmp_path), "--row-lengths", "65536"]
    with pytest.raises(SystemExit, match=r"^the training text has \d+ tokens, a row takes 65538$"):
        demo.train.main(words)
