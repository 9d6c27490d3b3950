"""Text appended to a saved state gives the results of the whole text, with the same random numbers."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xlstm_ray import RecurrentState, load
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.sampler import Sampler

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2, "eos_token_id": None, "vocab_size": 320}
NUMERICS = {"chunkwise_backend": "native", "tile_size": 8, "chunk_size": 8, "dtype": "float32"}
OPTIONS = "--chunkwise-backend native --tile-size 8 --chunk-size 8 --dtype float32".split()
BOOK = "The heir is Anne, says the will.\n"


def letters() -> dict[str, int]:
    """The characters for bytes in byte-level vocabularies, with the byte as id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(c for c in alphabet if ord(c) > 255)
    return {chr(b) if chr(b) in alphabet else next(spare): b for b in range(256)}


def write_tokenizer(directory: Path, merges: tuple[tuple[str, str], ...] = ()) -> None:
    """Bytes, and these merges; a begin and an end token around every text."""
    vocabulary = letters()
    vocabulary |= {a + b: len(vocabulary) + n for n, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=7, **SIZES)
    write_tokenizer(directory, (("A", "B"),))
    return directory


@pytest.fixture(scope="module")
def lm(model: Path):
    with load(model, **NUMERICS) as engine:
        yield engine


def through_a_file(state: RecurrentState, path: Path) -> RecurrentState:
    state.save(path)
    return RecurrentState.load(path)


def close(a: RecurrentState, b: RecurrentState) -> bool:
    """The tokens are equal, and the tensors within rounding: tails had other windows."""
    assert (a.prompt_hash, a.tokens) == (b.prompt_hash, b.tokens)
    return all(torch.allclose(x, b.tensors[name], rtol=1e-4, atol=1e-5) for name, x in a.tensors.items())


def test_what_is_appended_goes_on_as_the_whole_would(lm, tmp_path):
    book = through_a_file(lm.prefill(BOOK).state, tmp_path / "book")
    asked = lm.prefill(append="Who?", state=book)
    whole = lm.prefill(BOOK + "Who?")
    assert close(asked.state, whole.state)  # the begin token came once
    assert asked.state.rows[0].text == whole.state.rows[0].text
    assert asked.stats.resumed_tokens == sum(book.tokens)
    assert close(lm.prefill(append=[69, 70], state=book).state, lm.prefill(append="EF", state=book).state)
    more = "Who? And why is that so, at such a length?"
    assert close(lm.prefill(BOOK + more, state=asked.state).state, lm.prefill(append=more, state=book).state)


def test_one_state_serves_every_row_of_questions(run, model, tmp_path):
    book, questions, words = tmp_path / "book", tmp_path / "q.jsonl", ["--model", model]
    assert run("prefill", *words, *OPTIONS, "--prompt", BOOK, "--state-out", book).code == 0
    asked = ["Who?", "Why is that so, at such a length?", "When?"]
    questions.write_text("\n".join(map(json.dumps, asked)))
    words += ["--state-in", book, "--max-new-tokens", 6]
    ran = run("generate", *words, "--append-file", questions, "--jsonl", "--state-out", tmp_path / "all")
    assert ran.code == 0, ran
    rows = list(map(json.loads, ran.out.splitlines()))
    kept = ["--json", "--state-out", tmp_path / "one"]
    alone = [run("generate", *words, *kept, "--append", text).row for text in asked]
    assert [row["text"] for row in rows] == [row["text"] for row in alone]
    # A state of several rows: every row is printed, with or without --jsonl and --json.
    at_once = [*words[:2], *words[4:], *OPTIONS, *kept]
    whole = [run("generate", *at_once, "--prompt", BOOK + text).row for text in asked]
    assert [row["text"] for row in whole] == [row["text"] for row in alone]
    for more in ([], ["--jsonl"], ["--json"]):
        ran = run("generate", "--model", model, "--state-in", tmp_path / "all", "--max-new-tokens", 3, *more)
        assert ran.code == 0, ran
        assert len({row["state_digest"] for row in map(json.loads, ran.out.splitlines())}) == 3
    ran = run("prefill", "--model", model, "--state-in", tmp_path / "all", "--append", "?")
    assert len({row["state_digest"] for row in map(json.loads, ran.out.splitlines())}) == 3


def test_an_appended_run_that_was_stopped_goes_on(lm, tmp_path):
    book, more = lm.prefill(BOOK).state, "Who is it, and why, and where is all of the gold that is told of?"
    whole = lm.prefill(append=more, state=book).state
    asked = iter([False, False, False, True])
    part = through_a_file(lm.prefill(append=more, state=book, should_stop=lambda: next(asked)).state, tmp_path / "part")
    assert not part.complete
    assert part.tokens > book.tokens
    assert lm.prefill(append=more, state=part).state.digest() == whole.digest()
    assert lm.prefill(append=more, state=part).state.rows == whole.rows
    with pytest.raises(StateError, match="another text; append the same text"):
        lm.prefill(append="Something else that is long enough to differ from it", state=part)
    stopped = iter([False, True])
    half = lm.prefill(BOOK, should_stop=lambda: next(stopped)).state
    with pytest.raises(StateError, match="give the same prompt to go on"):
        lm.prefill(append="Who?", state=half)


def test_a_refusal_says_whether_text_or_tokens_differ_where_and_the_way_out(lm):
    state = lm.prefill("xA").state
    with pytest.raises(StateError, match=r"same text.* cuts it otherwise: .*at token 3.*`append`.* beginning 'B more'"):
        lm.prefill("xAB more", state=state)
    assert close(lm.prefill(append="B more", state=state).state, lm.prefill(append="B more", state=state).state)
    long = BOOK * 40
    state = lm.prefill(long).state
    wrong = long[:700] + "#" + long[701:]
    with pytest.raises(StateError) as refused:
        lm.prefill(wrong, state=state)
    said = str(refused.value)
    assert "its text differs" in said
    assert "with `append`" in said
    low, high = (int(part.split()[0]) for part in said.split("between byte ")[1].split(" and ")[:2])
    assert low <= 701 <= high < low + 64
    with pytest.raises(StateError, match="tokens, but .* already seen .*`append`"):
        lm.prefill(long[:-3], state=state)
    with pytest.raises(StateError, match="tokens.*`append`"):
        lm.prefill([1, 2, 3], state=state)


MISTAKES = {
    "both": ("--state-in s --append a --append-file b", "one"),
    "a prompt too": ("--state-in s --append a --prompt b", "give one"),
    "no state": ("--append a", "--state-in"),
    "nothing": ("--state-in s --append=", "empty"),
    "lines of a text": ("--state-in s --append a --jsonl", "--append-file"),
    "no file": ("--state-in s --append-file nowhere", "nowhere"),
}


@pytest.mark.parametrize("command", ["prefill", "generate"])
@pytest.mark.parametrize(("words", "part"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_of_appending_are_one_line(run, command, words, part):
    assert part in run(command, *words.split()).error


def test_python_refuses_the_same(lm):
    for given in ({"append": "a"}, {"append": "a", "prompt": "b", "state": lm.prefill("b").state}):
        with pytest.raises(UsageError, match="append"):
            lm.prefill(**given)
    with pytest.raises(UsageError, match="not Unicode text"):
        lm.prefill(append="\ud800", state=lm.prefill("b").state)


def test_text_with_a_space_of_its_own_is_appended_as_it_is(tmp_path):
    """A tokenizer like sentencepiece puts a space before every text; an appended text may go on within a word."""
    pieces = {f"<0x{b:02X}>": b for b in range(256)}
    pieces |= {piece: 256 + n for n, piece in enumerate(["\u2581", *"Parishot", "\u2581Par", "Par", "is"])}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    make_model(tmp_path, seed=7, **SIZES)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with load(tmp_path, **NUMERICS) as lm:
        whole = lm.encode("Paris is hot")
        for cut in (2, 5, 6, 9):
            state = lm.prefill("Paris is hot"[:cut]).state
            more = lm.encode_more("Paris is hot"[cut:], state.rows[0].end.tokens)
            assert lm.encode("Paris is hot"[:cut]) + more == whole
        long = "Paris is hot " * 9000  # cut in pieces
        for cut in (2, 6):
            assert lm.encode(long[:cut]) + lm.encode_more(long[cut:], lm.encode(long[:cut])) == lm.encode(long)


# -- random numbers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("again", [True, False], ids=["given again", "remembered"])
def test_a_seeded_continuation_goes_on_with_its_random_numbers(run, model, tmp_path, again):
    settings = ["--temperature", "0.9", "--seed", "5", "--top-k", "40"]
    words = ["generate", "--model", model, "--json"]
    whole = run(*words, *OPTIONS, "--prompt", BOOK, *settings, "-n", 12).row["text"]
    first = run(*words, *OPTIONS, "--prompt", BOOK, *settings, "-n", 5, "-o", tmp_path / "s").row["text"]
    rest = run(*words, "--state-in", tmp_path / "s", "-n", 7, *(settings if again else [])).row["text"]
    assert first + rest == whole
    greedy = run(*words, "--state-in", tmp_path / "s", "-n", 7, "--temperature", 0).row["text"]
    assert greedy != rest


def test_a_seeded_row_does_not_depend_on_its_neighbours(lm):
    texts = [BOOK, "A", BOOK[:11]]
    made = lm.generate(texts, max_new_tokens=9, seed=3)
    list(made.rows())
    for text, tokens in zip(texts, made.tokens, strict=True):
        alone = lm.generate(text, max_new_tokens=9, seed=3)
        list(alone)
        assert alone.tokens == [tokens]


def test_sampling_follows_the_probabilities_and_keeps_to_its_limits():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, -3.0]])
    for options, kept in (
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 1}, [1]),  # of equal ones the lowest id
        ({"top_p": 0.5}, [1, 2]),
        ({"top_k": 3, "top_p": 0.8}, [1, 2]),  # top_p counts the mass of the tokens that top_k keeps
    ):
        row = Sampler(1, 5)
        row.put(0, Sampling(temperature=1.0, seed=1, **options), position=0)
        drawn = torch.cat([row.choose(logits, torch.tensor([0])) for _ in range(4000)])  # a position each
        expected = torch.softmax(logits[0, kept].double(), -1)
        found = torch.stack([(drawn == n).double().mean() for n in kept])
        assert set(drawn.tolist()) <= set(kept)
        assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-307, 1e-308, 5e-324])
def test_towards_zero_sampling_becomes_greedy(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    rows = Sampler(3, 50)
    for slot in range(3):
        rows.put(slot, Sampling(temperature=temperature, seed=2), position=slot + 1)
    assert rows.choose(logits, torch.arange(3)).tolist() == logits.argmax(-1).tolist()
