"""Pieces of text: for any tokenizer, tokens and cuts, all pieces together are the plain decoding of all tokens."""

from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xlstm_ray.text.detokenize import Detokenizer, TextEnd

BYTES = {f"<0x{b:02X}>": b for b in range(256)}
SPECIAL = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
HINTS = [
    "\u2581",
    "\u2581a",
    "a",
    "b",
    ".",
    "\u2581\u8a9e",
    "\ufffd",
    " ",
    "##a",
    "##",
    "\u20ac",
    "n't",
    "a</w>",
    "</w>",
    "|",
    "",
]


def byte_letters() -> dict[int, str]:
    """The characters for bytes in byte-level vocabularies: bytes without a letter get the next free letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(c for c in alphabet if ord(c) > 255)
    return {b: chr(b) if chr(b) in alphabet else next(spare) for b in range(256)}


def _named(kind: str) -> Tokenizer:
    """A tokenizer of this kind, with hidden tokens and one that is added but shows."""
    pieces = BYTES | {piece: 256 + n for n, piece in enumerate(HINTS)}
    llama = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind.startswith("byte-level"):
        vocabulary = {c: b for b, c in byte_letters().items()} | {
            "\u0120a": 256,
            "\u00e2\u0124": 257,
            "\u00f0\u0141": 258,
        }
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
        if kind.endswith("processed"):
            tokenizer.post_processor = processors.ByteLevel()
    elif kind == "wordpiece":
        words = {piece: n for n, piece in enumerate(["[UNK]", "a", "b", "##a", "##b", "##", ".", "##.", "'", "n't"])}
        tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece()
    elif kind.startswith("unigram"):
        scored = [("<unk>", 0.0), *((piece, -1.0) for piece in pieces if piece)]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=kind.endswith("bytes")))
        tokenizer.decoder = decoders.Sequence(llama) if kind.endswith("bytes") else decoders.Metaspace()
    else:
        tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        found = {
            "llama": lambda: decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)]),
            "wide strip": lambda: decoders.Sequence([*llama, decoders.Strip(" ", 3, 0)]),
            "gemma": lambda: decoders.Sequence(llama),
            "metaspace": decoders.Metaspace,
            "suffix": lambda: decoders.BPEDecoder("</w>"),
            "ctc": lambda: decoders.CTC("a", "|"),
            "none": lambda: None,
        }[kind]()
        if found is not None:
            tokenizer.decoder = found
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<shown>", special=False, normalized=False)])
    return tokenizer


KINDS = (
    "byte-level,byte-level processed,llama,wide strip,gemma,metaspace,suffix,ctc,none,wordpiece,unigram,unigram bytes"
)
MADE = {kind: _named(kind) for kind in KINDS.split(",")}


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, also ones that no text has and unused ids; texts with characters of many bytes."""
    size = tokenizer.get_vocab_size()
    rare = [n for n in range(size) if n > 255 or tokenizer.id_to_token(n) in SPECIAL] + [size + 7]
    euro = [list("\u20ac\U0001f600\u00e9".encode())[n:] for n in range(9)]
    bytelike = [[tokenizer.token_to_id(f"<0x{b:02X}>") or b for b in run] for run in euro]
    some = st.one_of(
        st.lists(st.integers(0, size - 1), max_size=6),
        st.lists(st.sampled_from(rare), max_size=4),
        st.sampled_from(bytelike),
        st.builds(lambda n, times: [n] * times, st.integers(0, size - 1), st.integers(1, 40)),
    )
    return st.lists(some, max_size=8).map(lambda parts: [min(n, size + 9) for part in parts for n in part])


def require_after(printed: str, before: str, whole: str) -> None:
    """The printed text is the decoding of all, after the text before; replacement marks at its end may disappear."""
    if whole.startswith(before.rstrip("\ufffd")):
        assert printed == whole[len(commonprefix([before, whole])) :]
    else:  # bytes of the answer turned earlier text into replacement marks
        assert whole.endswith(printed)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_what_decoding_makes_of_all(kind, data):
    tokenizer = MADE[kind]
    of = Detokenizer(tokenizer)
    prompt, answer = data.draw(ids_of(tokenizer)), data.draw(ids_of(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=4).map(sorted))
    end, printed = of.end_of(prompt), ""
    for start, stop in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        stream = of.stream(TextEnd.model_validate_json(end.model_dump_json()))  # as a file keeps it
        printed += "".join(map(stream.step, answer[start:stop]))
        end = stream.end()
    printed += stream.finish()
    require_after(printed, of.decode(prompt), of.decode(prompt + answer))


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_text_that_is_given_in_between_is_not_printed(kind, data):
    """A person's text is appended to an answer; the next answer's pieces come after both."""
    tokenizer = MADE[kind]
    of = Detokenizer(tokenizer)
    first, more, answer = (data.draw(ids_of(tokenizer)) for _ in range(3))
    stream = of.stream(of.end_of(first))
    for token in first:
        stream.step(token)
    stream = of.stream(of.end_of(more, stream.end()))
    printed = "".join(map(stream.step, answer)) + stream.finish()
    require_after(printed, of.decode(first + first + more), of.decode(first + first + more + answer))


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def decode(self, tokens: list[int], **options: bool) -> str:
        self.decoded += len(tokens)
        return self._tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("kind", MADE)
def test_the_work_is_linear_whatever_the_tokens(kind):
    """Hidden tokens, stray bytes, single bytes, words: the decoded window stays short, or is decoded once."""
    tokenizer = MADE[kind]
    size = tokenizer.get_vocab_size()
    for tokens in ([tokenizer.token_to_id("</s>")], [0x80], [0xE2, 0x82, 0xAC], [size - 1], list(range(size)), [3]):
        counting = Counting(tokenizer)
        of = Detokenizer(counting)  # type: ignore[arg-type]
        stream = of.stream(of.end_of(tokens))
        answer = (tokens * 4000)[:4000]
        printed = "".join(map(stream.step, answer)) + stream.finish()
        require_after(printed, of.decode(tokens), of.decode(tokens + answer))
        assert counting.decoded < 40 * 4000 + 2 * 4000


def test_a_text_that_ends_inside_a_character_says_so_and_goes_on():
    of = Detokenizer(MADE["byte-level"])
    smile = list("\U0001f600".encode())
    first = of.stream(of.end_of([66]))
    assert [first.step(token) for token in smile[:2]] == ["", ""]
    rest = of.stream(first.end())
    assert first.finish() == "\ufffd"
    assert [rest.step(token) for token in smile[2:]] == ["", "\U0001f600"]
