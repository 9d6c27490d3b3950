"""Prompts in files: the same text and tokens as in memory, and none of them stays there."""

import gc
import random
from array import array
from collections.abc import Callable
from copy import copy
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest
import torch
from tiny import make_model

from xlstm_ray.cli.input import prompt_in
from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.tokens import Stored, ids
from xlstm_ray.engine.tree import LINKS, STEP, Chain
from xlstm_ray.errors import CheckpointError, OutputError, UsageError
from xlstm_ray.text.history import TextTrail, TokenTrail
from xlstm_ray.text.ondisk import PIECE, TextFile, TokenFile, take_text
from xlstm_ray.text.prompt import decoded, whole_prompt
from xlstm_ray.text.tokenizer import Text

CHARACTERS = "a é語😀\r\n\t"


def text_file(data: bytes) -> TextFile:
    file = TemporaryFile()
    file.write(data)
    file.flush()
    return TextFile(file)


def token_file(numbers: list[int]) -> TokenFile:
    return TokenFile.of([array("i", numbers[:5]), array("i"), array("i", numbers[5:])])


def test_a_slice_of_a_text_in_a_file_is_that_of_the_text() -> None:
    draw = random.Random(1)
    text = "".join(draw.choices(CHARACTERS, k=500_000))  # several pieces, whose ends are inside of characters
    assert len(text.encode()) > 3 * PIECE
    found = text_file(text.encode())
    assert len(found) == len(text)
    places = [0, 1, len(text) // 2, len(text) - 1, len(text), *(draw.randrange(len(text)) for _ in range(40))]
    for start in places:
        for stop in (start, start + 1, start + 70_000, len(text), len(text) + 9):
            assert found[start:stop] == text[start:stop]
    assert found[:] == text
    trail = TextTrail()
    for piece in found.pieces():
        trail = trail.extend(piece)
    assert trail == TextTrail().extend(text.encode())
    assert copy(found) == text  # as another process gets it


@pytest.mark.parametrize(
    "data",
    [b"a", b"a\n", b"a\r\n", b"a\r", b"a\n\n", b"\n", b"\r\n", b"", b"\xef\xbb\xbf", b"\xef\xbb\xbfa\n",
     b"\xef\xbb\xbf\xef\xbb\xbfa", b"\xff", b"a\nb\n\xe8\xaa", b"\xe8\xaa\n", b"ab\n" * PIECE + b"\x80",
     "ab\n".encode("utf-16"),
     b"\xef\xbb\xbf" + "é語".encode() * PIECE + b"\r\n"],
)  # fmt: skip
def test_what_prompt_file_reads_and_an_upload_becomes_is_the_prompt_of_that_text(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(data)

    def taken() -> bytes:
        take_text(path, str(path))
        return path.read_bytes()

    here = outcome(lambda: whole_prompt(decoded(data, str(path)), str(path)).encode())
    assert outcome(lambda: prompt_in(str(path))[:].encode()) == here
    assert outcome(lambda: b"".join(prompt_in(str(path)).pieces())) == here
    assert outcome(taken) == here


def outcome(make: Callable[[], bytes]) -> bytes | str:
    """What it makes, or what is wrong."""
    try:
        return make()
    except UsageError as err:
        return str(err)


def test_tokens_in_a_file_are_a_sequence_that_is_read_when_it_is_asked_for() -> None:
    draw = random.Random(2)
    numbers = [draw.randrange(1 << 30) for _ in range(PIECE // 2)]
    before = psutil.Process().num_fds()
    found = token_file(numbers)
    assert [*found] == numbers
    assert [*reversed(found)] == numbers[::-1]
    assert (len(found), found[0], found[-1], found[7]) == (len(numbers), numbers[0], numbers[-1], numbers[7])
    with pytest.raises(IndexError):
        found[len(numbers)]
    part = found[100:90_000][50:]
    assert [*part] == numbers[150:90_000]
    assert [*found[9:3]] == []
    row = Stored(found)
    assert torch.equal(row[40_000:40_100], torch.tensor(numbers[40_000:40_100], dtype=torch.int32))
    assert len(row[5:5]) == 0
    assert [*ids(row, slice(3, 9))] == numbers[3:9]
    assert TokenTrail().extend(found) == TokenTrail().extend(numbers)
    assert TokenTrail().extend(numbers[:1000]).difference(found) is None
    assert copy(found[:10]) == numbers[:10]  # as another process gets it
    del found, part, row
    gc.collect()
    assert psutil.Process().num_fds() == before


def test_hashes_of_a_long_prompts_beginnings_are_few_and_the_same() -> None:
    """Of a prompt with more than LINKS steps, places in between are computed again."""
    draw = random.Random(3)
    numbers = array("i", (draw.randrange(1 << 20) for _ in range(STEP * LINKS * 2 + 100)))
    long = Chain(b"root", TokenFile.of([numbers]))
    assert (long.every, len(long._links)) == (2 * STEP, len(long.places) + 1)
    assert len(long._links) <= LINKS + 1
    for length in (0, 1, 63, 64, 65, 130, 1000, 256 * 40, 256 * 40 + 65):
        assert long.at(length) == Chain(b"root", memoryview(numbers[:length])).at(length)


@pytest.mark.parametrize("length", [0, 63, 64, 1000, STEP * LINKS + 10])
def test_a_chain_goes_on_from_that_of_a_beginning(length: int) -> None:
    numbers = array("i", range(STEP * LINKS + 200))
    begun = Chain(b"root", memoryview(numbers)[:length])
    for more in (0, 1, 130):  # at the last, fewer places are kept than before
        whole = memoryview(numbers)[: length + more]
        assert [*Chain(b"root", whole, begun).kept()] == [*Chain(b"root", whole).kept()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=32, num_hidden_layers=1, num_heads=2, force_bos_token_insert=True)
    return directory


def test_a_text_in_a_file_becomes_the_same_tokens_in_a_file(model: Path) -> None:
    text = Text(model, ModelConfig.from_file(model / "config.json"))
    given = "Is it a tree, or é語?\n" * 9_000
    told: list[tuple[int, int]] = []
    file = text_file(given.encode())
    file.on_piece = lambda done, of: told.append((done, of))
    expected = text.tokens(given)
    assert expected[0] == 257  # the begin token
    assert torch.equal(Stored(text.on_disk(file))[:], expected)
    assert told == sorted(told)
    assert (len(told) > 2, told[-1]) == (True, (len(given), len(given)))
    assert torch.equal(text.tokens(file), expected)
    short = text_file(b"short")
    assert torch.equal(Stored(text.on_disk(short))[:], text.tokens("short"))
    with pytest.raises(UsageError, match="token 259 is outside the model's vocabulary"):
        text.on_disk(token_file([1, 2, 3, 4, 5, 6, 259]))
    stored = token_file([1, 2, 3])
    assert text.on_disk(stored) is stored
    file = text_file(given.encode())
    file.folder = model / "none"
    with pytest.raises(OutputError, match="tokens cannot be kept there"):
        text.on_disk(file)


def test_a_tokenizer_that_must_have_a_text_whole_gets_it_whole(model: Path, tmp_path: Path) -> None:
    """It drops characters, so the places of its tokens are wrong: pieces cannot be joined."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(path / "tokenizer.json"))
    text = Text(path, ModelConfig.from_file(path / "config.json"))
    given = "abx" * 50_000
    assert [*text.on_disk(text_file(given.encode()))] == text.tokens(given).tolist() == [257, *[0, 1] * 50_000]
    with pytest.raises(CheckpointError, match="makes no tokens of the prompt"):
        text.on_disk(text_file(b"xxx"))
