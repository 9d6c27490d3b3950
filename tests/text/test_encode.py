"""Encoding in pieces gives the tokens of the whole text, for any kind of tokenizer."""

import os
import subprocess
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from tempfile import TemporaryFile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import xlstm_ray
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import MemoryLimitError, UsageError
from xlstm_ray.text import encode, pieces
from xlstm_ray.text.encode import Led, TextEncoder
from xlstm_ray.text.ondisk import TextFile
from xlstm_ray.text.tokenizer import Text

CORPUS = [
    "The quick brown fox jumps over the lazy dog's tail; don't they've 1234567 numbers 3.14159 and  spaces   here\n\n",
    "Der Bär läuft über die Straße, naïve café Ångström e\u0301te\u0301 \u8a9e\u8a00\u5904\u7406 \U0001f600\U0001f600",
    "aaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb abababababababab 000000000000 112233 \t\t\t\r\n\r\n  x",
] * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(cutter, normalizer=None, *, alphabet=(), known=(), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cutter
    trainer = trainers.BpeTrainer(
        vocab_size=500 + len(known),
        initial_alphabet=list(alphabet),
        special_tokens=["?", *known] if model.get("unk_token") else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def trained(model, trainer, cutter, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cutter
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_added(tokenizer):
    tokenizer.add_tokens([AddedToken("fox dog", single_word=True), AddedToken("ZZ", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("ab", normalized=False)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    return tokenizer


BYTES = pre_tokenizers.ByteLevel.alphabet()
LEVEL, SPLIT, SEQUENCE = pre_tokenizers.ByteLevel, pre_tokenizers.Split, pre_tokenizers.Sequence
KINDS = {
    "gpt2": lambda: bpe(LEVEL(add_prefix_space=False), alphabet=BYTES),
    "gpt2, prefix, trimmed": lambda: _trimmed(bpe(LEVEL(add_prefix_space=True), alphabet=BYTES)),
    "bytes of a whole text": lambda: bpe(LEVEL(add_prefix_space=False, use_regex=False), alphabet=BYTES),
    "llama3": lambda: bpe(
        SEQUENCE([SPLIT(Regex(LLAMA3), "isolated"), LEVEL(add_prefix_space=False, use_regex=False)]), alphabet=BYTES
    ),
    "llama3, whole words": lambda: bpe(
        SEQUENCE([SPLIT(Regex(LLAMA3), "isolated"), LEVEL(add_prefix_space=False, use_regex=False)]),
        alphabet=BYTES,
        ignore_merges=True,
    ),
    "deepseek": lambda: bpe(
        SEQUENCE(
            [SPLIT(Regex(r"\p{N}{1,3}"), "isolated"), SPLIT(Regex(r"\s+|\w+"), "isolated"), LEVEL(False, True, False)]
        ),
        alphabet=BYTES,
    ),
    "starcoder, composed": lambda: bpe(
        SEQUENCE([pre_tokenizers.Digits(True), LEVEL(add_prefix_space=False)]), normalizers.NFC(), alphabet=BYTES
    ),
    "llama2": lambda: bpe(
        None,
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        byte_fallback=True,
        unk_token="?",
        fuse_unk=True,
        known=[f"<0x{byte:02X}>" for byte in range(256)],
    ),
    "metaspace": lambda: bpe(
        pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC(), unk_token="?", fuse_unk=True
    ),
    "metaspace, no cuts": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always", split=False), unk_token="?"),
    "gemma": lambda: bpe(SPLIT(" ", "merged_with_previous"), normalizers.Replace("aa", "b"), unk_token="?"),
    "drops what it does not know, no cuts": lambda: bpe(pre_tokenizers.Metaspace()),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]),
    ),
    "unigram, no cuts": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        None,
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "wordlevel": lambda: trained(
        models.WordLevel(unk_token="?"),
        trainers.WordLevelTrainer(vocab_size=400, special_tokens=["?"], show_progress=False),
        pre_tokenizers.Whitespace(),
    ),
    "words with ends": lambda: trained(
        models.BPE(unk_token="?", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], end_of_word_suffix="</w>", show_progress=False),
        pre_tokenizers.WhitespaceSplit(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    ),
}


def _trimmed(tokenizer):
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@cache
def tokenizer_of(kind: str, added: bool) -> Tokenizer:
    tokenizer = with_added(KINDS[kind]()) if added else KINDS[kind]()
    return Tokenizer.from_str(tokenizer.to_str())  # as a file is read: its numbers are rounded once


WORDS = "fox|dog|fox dog|don't| |  |    |\n|\r\n|\t|a|aa|ab|b|aaaa|ZZ| ZZ |1|12|1234|000"
WORDS += "|e\u0301|\xe9|\u0301|\u8a9e|\U0001f600"
WORDS += "|.|...|'s|'|\xdf|\xc5|<s>|The quick"
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS.split("|")),
        st.builds(lambda s, n: s * n, st.sampled_from(list("ab 0\n'.\xe9")), st.integers(1, 60)),
        st.text(max_size=6),
    ),
    max_size=120,
).map("".join)


SPACES = "fox" * 13 + " " * 85 + "ZZ "  # an added token takes more white space before it than pieces overlap


@pytest.mark.parametrize("added", [False, True], ids=["", "added tokens"])
@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, piece=st.sampled_from([64, 100, 256]))
@example(text=SPACES, piece=64)
@settings(max_examples=20, deadline=None)
def test_pieces_give_the_tokens_of_the_whole(kind, added, text, piece):
    tokenizer = tokenizer_of(kind, added)
    encoder = TextEncoder(tokenizer, piece=piece, overlap=32)
    for special in True, False:
        expected = tokenizer.encode(text, add_special_tokens=special).ids
        assert encoder.encode(text, special=special).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, lead=st.sampled_from(["\n", ".", "a"]), piece=st.sampled_from([64, 256]))
@example(text=SPACES, lead="\n", piece=64)
@settings(max_examples=15, deadline=None)
def test_what_follows_a_lead_is_the_same_in_pieces_of_a_file(kind, text, lead, piece):
    tokenizer = tokenizer_of(kind, added=True)
    whole = tokenizer.encode(lead + text, add_special_tokens=False)
    expected = [token for token, (start, _) in zip(whole.ids, whole.offsets, strict=True) if start >= len(lead)]
    encoder = TextEncoder(tokenizer, piece=piece, overlap=32)
    assert encoder.encode(lead + text, special=False, skip=len(lead)).tolist() == expected
    with TemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        assert encoder.encode(Led(lead, TextFile(file)), special=False, skip=len(lead)).tolist() == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no cuts" not in kind])
def test_a_long_text_is_not_encoded_at_once(kind):
    text, done = "".join(CORPUS) * 200, []
    tokenizer = tokenizer_of(kind, added=True)
    assert TextEncoder(tokenizer).encode(text, done.append).tolist() == tokenizer.encode(text).ids
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == len(text)


@pytest.mark.parametrize("length", [600, 2500, 20_000])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no cuts" not in kind])
def test_long_words_are_not_encoded_at_once(kind, length):
    """Of which a tokenizer may make a token each: then few of them are in an overlap."""
    words, done = ["".join("abcdef"[n * n * k % 17 % 6] for n in range(length)) for k in range(1, 9)], []
    text = " ".join(words * (200_000 // 8 // length + 1))
    tokenizer = tokenizer_of(kind, added=False)
    assert TextEncoder(tokenizer).encode(text, done.append).tolist() == tokenizer.encode(text).ids
    assert len(done) > 1


@pytest.mark.parametrize("text", ["a" * 200_000, "0" * 200_000, " " * 200_000, "ab" * 100_000])
@pytest.mark.parametrize("kind", ["gpt2", "bytes of a whole text", "llama2", "metaspace, no cuts"])
def test_one_endless_word_is_not_encoded_at_once(kind, text):
    tokenizer, done = tokenizer_of(kind, added=False), []
    assert TextEncoder(tokenizer).encode(text, done.append).tolist() == tokenizer.encode(text).ids
    assert len(done) > 2 or (kind == "llama2" and text[0] == " ")  # a prepended space puts pairs of spaces out of step


CHILD = """
import sys, xlstm_ray
lm = xlstm_ray.load(device="cpu", chunkwise_backend="native", tile_size=64)
def first(progress):
    status = open("/proc/self/status").read()
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
    raise SystemExit
lm.prefill("a" * int(sys.argv[1]), on_progress=first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_long_text_takes_little_memory_before_the_first_tile():
    """Encoded at once, a million tokens took over 250 MiB; now 4 bytes each, and 4 more while they are hashed."""

    def peak(tokens: int) -> int:
        done = subprocess.run([sys.executable, "-c", CHILD, str(tokens)], capture_output=True, text=True, timeout=120)
        return int(done.stdout)

    assert peak(1_000_000) - peak(20_000) < 48 << 10  # KiB


def test_a_hard_limit_holds_while_a_text_is_cut_into_tokens():
    lm = xlstm_ray.load(device="cpu", chunkwise_backend="native", force=True, mem_hard_mb=20)
    with pytest.raises(MemoryLimitError, match=r"^memory: this process uses .*hard limit of 20 MiB, while it cuts"):
        lm.prefill("a" * 200_000)


def test_no_request_touches_what_other_threads_write_to():
    """File descriptor 2 belongs to the process: other threads write there while one thread encodes and decodes."""
    text = Text(DEMO_MODEL, ModelConfig.from_file(DEMO_MODEL / "config.json"))
    seen, end = set(), threading.Event()

    def look() -> None:
        while not end.is_set():
            seen.add((os.fstat(2).st_dev, os.fstat(2).st_ino))

    thread = threading.Thread(target=look)
    thread.start()
    ids = text.tokens("Once upon a time, 1 \u00e9\u8a9e. " * 2000).tolist()
    assert text.more(" there was", ids[-50:])
    assert text.stream(text.end_of(ids)).step(ids[0]) is not None
    assert text.likeliest(torch.zeros(300), 3)
    end.set()
    thread.join()
    assert seen == {(os.fstat(2).st_dev, os.fstat(2).st_ino)}


@st.composite
def related(draw) -> list[str]:
    """Texts of which each begins as one before, up to some place."""
    texts = [draw(TEXTS)]
    for _ in range(draw(st.integers(1, 5))):
        before, kept, rest = draw(st.sampled_from(texts)), draw(st.floats(0.3, 1)), draw(st.integers(0, 9))
        place = round(kept * len(before))
        texts.append(before[:place] + draw(TEXTS) + before[place + rest :] * draw(st.booleans()))
    return texts


ENDS = ["fox dog" * 20 + end for end in (" " * 60, " " * 60 + "ZZ", " " * 90 + "fox", "e", "e\u0301te" * 9, "fox" * 9)]


@pytest.mark.parametrize("added", [False, True], ids=["", "added tokens"])
@pytest.mark.parametrize("kind", KINDS)
@given(texts=related(), piece=st.sampled_from([100, 256, 600]), characters=st.sampled_from([0, 700, 1 << 20]))
@example(texts=ENDS, piece=100, characters=1 << 20)
@example(texts=ENDS[::-1], piece=256, characters=1 << 20)
@settings(max_examples=20, deadline=None)
def test_texts_that_begin_as_others_have_the_tokens_of_their_own(kind, added, texts, piece, characters):
    tokenizer = tokenizer_of(kind, added)
    encoder = TextEncoder(tokenizer, piece=piece, overlap=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST", characters)
        for text in [*texts, texts[0]]:
            assert encoder.encode(text).tolist() == tokenizer.encode(text).ids


def test_threads_that_encode_at_once_share_what_is_kept(monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 3000)
    tokenizer, texts = tokenizer_of("llama3", True), [" ".join(CORPUS)[: 600 + 37 * n] + f" end {n}" for n in range(24)]
    encoder = TextEncoder(tokenizer, piece=400, overlap=32)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(encoder.encode, texts * 8))
    assert [ids.tolist() for ids in made] == [tokenizer.encode(text).ids for text in texts] * 8


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """How many characters each call of the tokenizers library gets."""
    made = []

    class Counted:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def encode(self, text, **how):
            made.append(len(text))
            return self.tokenizer.encode(text, **how)

    plain = encode._plain
    monkeypatch.setattr(encode, "_plain", lambda tokenizer: Counted(plain(tokenizer)))
    return made


def test_of_a_text_that_begins_as_one_before_little_is_encoded(lengths):
    words = "The quick brown fox jumps over the lazy dog 's 1234 tails\n".split(" ")
    text = " ".join(words[n * n * n % 97 % len(words)] for n in range(60_000))
    tokenizer = tokenizer_of("gpt2", False)
    encoder = TextEncoder(tokenizer)

    def encoded(text: str, *, compared: bool = True) -> int:
        lengths.clear()
        ids = encoder.encode(text)
        assert not compared or ids.tolist() == tokenizer.encode(text).ids
        return sum(lengths)

    assert encoded(text[:20_000]) == 20_000
    assert encoded(text[:20_000] + " more") < 2 * encode.OVERLAP
    assert encoded(text) > len(text) - 20_000 > 3 * encode.PIECE
    assert encoded(text) == 0
    lengths.clear()
    assert encoder.encode(text, tenant="another") == encoder.encode(text)  # who pays for all of it, once
    assert sum(lengths) >= len(text)
    for end in (" one more", " 2 others\n\n", "", "e" * 100):
        assert encoded(text + end) < 2 * encode.OVERLAP
    assert encoded(text[:-5000]) < 2 * encode.OVERLAP
    place = len(text) * 4 // 5
    assert encoded(f"{text[:place]}!{text[place + 1 :]}") < encode.PIECE + 2 * encode.OVERLAP  # to that piece's end
    for turn in range(1, 101):  # of a conversation, which may fill a piece
        text += " And the brown dog?" * 40
        assert encoded(text, compared=turn % 50 == 0) < 3 * encode.OVERLAP


def test_a_conversation_is_cut_from_where_its_last_turn_begins(lengths):
    text = Text(DEMO_MODEL, ModelConfig.from_file(DEMO_MODEL / "config.json"))
    said = "To talk of many things: of shoes and ships and sealing-wax. " * 4000
    for turn in range(3):
        said += f"And {turn}? "
        lengths.clear()
        assert text.conversation(said) == text.tokenizer.encode(said, add_special_tokens=False).ids
        assert not turn or sum(lengths) < 2 * encode.OVERLAP


@pytest.mark.parametrize("kind", [list, tuple, partial(array, "i"), partial(array, "q")])
def test_token_ids_are_taken_from_any_list_of_whole_numbers_and_copied(kind):
    text = Text(DEMO_MODEL, ModelConfig.from_file(DEMO_MODEL / "config.json"))
    given = kind([3, 0, 1])
    made = text.tokens(given)
    assert (made.tolist(), made.dtype) == ([3, 0, 1], torch.int32)
    if isinstance(given, array):
        given[0] = 9
        assert made.tolist() == [3, 0, 1]
    for odd in (-1, text.vocabulary):
        with pytest.raises(UsageError, match=f"token {odd} is outside the model's vocabulary"):
            text.tokens(kind([1, odd]))
