"""Stop texts are found with any cuts of the text, and shown text is never taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_ray.sampling import Sampling
from xlstm_ray.text.answer import Answer, Finish
from xlstm_ray.text.stop import StopMatcher


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the answer ends and by which text, by trying every end in turn."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return end - len(longest), longest
    return None


TEXT = st.text("ab\n", max_size=30)


@given(TEXT, st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4), st.lists(st.integers(0, 30)))
@settings(max_examples=500)
def test_stop_texts_are_found_as_in_the_whole_text(text, stops, cuts):
    matcher, shown = StopMatcher(stops), ""
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    expected = first_stop(text, stops)
    for start, end in zip(places, places[1:], strict=False):
        shown += matcher.feed(text[start:end])
        if matcher.found is not None:
            break
        # All that can be shown is shown: what is held begins a stop text.
        held = text[len(shown) : end]
        assert text[:end].startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    if expected is None:
        assert matcher.found is None
        assert shown + matcher.finish() == text
    else:
        assert (shown, matcher.found) == (text[: expected[0]], expected[1])
        assert matcher.feed("more") == matcher.finish() == ""


@given(TEXT, TEXT, st.text("ab\n", min_size=1, max_size=5))
@settings(max_examples=300)
def test_within_the_first_tokens_no_stop_text_ends(early, late, stop):
    matcher = StopMatcher([stop])
    shown = matcher.feed(early, may_stop=False)
    assert matcher.found is None
    shown += "".join(map(matcher.feed, late))
    text = early + late
    ends = [n for n in range(len(early) + 1, len(text) + 1) if text[:n].endswith(stop)]
    if ends:
        assert (shown, matcher.found) == (text[: ends[0] - len(stop)], stop)
    else:
        assert shown + matcher.finish() == text


# -- an answer ---------------------------------------------------------------------------------------------------------
class Letters:
    """A stream whose tokens are letters; a capital waits for the next one, like bytes of a character."""

    def __init__(self) -> None:
        self.waiting = ""

    def step(self, token: int) -> str:
        letter = chr(token)
        if letter.isupper():
            self.waiting += letter
            return ""
        return self.finish() + letter

    def finish(self) -> str:
        waiting, self.waiting = self.waiting, ""
        return waiting


def answered(tokens: str, *, last: bool = True, **options) -> tuple[list[str], Answer]:
    answer = Answer(Sampling(**options), [ord("."), ord("!")], Letters(), last=last)  # type: ignore[arg-type]
    pieces = []
    for token in map(ord, tokens):
        pieces.append(answer.step(token))
        if answer.finish is not None:
            break
    assert "".join(pieces) == answer.text
    assert answer.said.startswith(answer.text)
    return pieces, answer


CASES = {
    "an end token": ("ab.c", {}, "ab", "ab", Finish("stop", ord("."))),
    "another end token": ("ab!c", {}, "ab", "ab", Finish("stop", ord("!"))),
    "an end token that is ignored": (
        "ab.c",
        {"ignore_eos": True, "max_new_tokens": 4},
        "ab.c",
        "ab.c",
        Finish("length"),
    ),
    "the limit": ("abcdef", {"max_new_tokens": 3}, "abc", "abc", Finish("length")),
    "a stop text over tokens": ("abcdef", {"stop": "cd"}, "ab", "abcd", Finish("stop", "cd")),
    "a stop text that only begins": ("abc.", {"stop": "cd"}, "abc", "abc", Finish("stop", ord("."))),
    "the limit in a stop text": ("abcd", {"stop": "cd", "max_new_tokens": 3}, "abc", "abc", Finish("length")),
    "both at once": ("abcd", {"stop": "cd", "max_new_tokens": 4}, "ab", "abcd", Finish("stop", "cd")),
    "a stop text too early": ("abab", {"stop": "ab", "min_tokens": 2}, "ab", "abab", Finish("stop", "ab")),
    "one in what was waiting": ("abX.", {"stop": "X"}, "ab", "abX", Finish("stop", "X")),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_ends_where_it_should_and_says_why(case):
    tokens, options, text, said, finish = CASES[case]
    _, answer = answered(tokens, **options)
    assert (answer.text, answer.said, answer.finish) == (text, said, finish)
    assert "".join(map(chr, answer.tokens)) == tokens[: len(answer.tokens)]


def test_what_waits_is_shown_at_the_end_or_left_for_later():
    assert answered("aX", max_new_tokens=2)[1].text == "aX"
    _, answer = answered("aX", max_new_tokens=2, last=False)
    assert (answer.text, answer.stream.waiting) == ("a", "X")  # type: ignore[attr-defined]
    for reason in ("cancelled", "error"):
        _, answer = answered("abcX", stop=["cXd"])
        assert answer.text == "ab"
        assert answer.end(reason) == "cX"
        assert (answer.text, answer.finish) == ("abcX", Finish(reason))
        assert answer.end(reason) == ""
