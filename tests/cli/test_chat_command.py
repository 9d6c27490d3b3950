"""`chat`: turns and commands by lines, and in a real terminal with real signals."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest
from conftest import Ran
from programs import PROGRAM
from tiny import model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.text.template import PLAIN, Template

__all__ = ["model"]

OPTIONS: dict[str, Any] = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 32, "chunk_size": 16}
MARKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ '<bot>' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def words(model: Path) -> tuple[object, ...]:
    options = "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16 --temperature 0"
    return ("chat", "--model", model, *options.split())


@pytest.fixture(scope="module")
def lm(model: Path):
    with xlstm_ray.load(model, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def said(run, words, monkeypatch):
    """The command after these lines on standard input, in this process."""

    def call(lines: str | bytes, *more: object) -> Ran:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run(*words, *more)

    return call


def rows(ran: Ran) -> list[dict[str, Any]]:
    assert ran.code == 0, ran
    return [json.loads(line) for line in ran.out.splitlines()]


def answers(lm: Any, turns: list[str], template: Template = PLAIN, **how: Any) -> list[str]:
    chat = lm.chat(template=template, sampling={"max_new_tokens": 6, "temperature": 0}, **how)
    return ["".join(chat.say(turn)) for turn in turns]


# -- lines -------------------------------------------------------------------------------------------------------------
def test_each_line_is_a_turn_and_an_answer_a_line(said, lm):
    ran = said("How are you?\r\n\nAnd then?\n//a way", "-n", 6)
    assert ran.out == "".join(text + "\n" for text in answers(lm, ["How are you?", "And then?", "/a way"]))
    (note,) = ran.err.splitlines()
    assert note.startswith("note: this model has no chat template")
    assert "--chat-template FILE" in note


def test_json_has_a_row_for_each_turn_which_reads_only_what_is_new(said, lm):
    first, second = rows(said("How are you?\nAnd then?\n", "-n", 6, "--json"))
    assert [first["text"], second["text"]] == answers(lm, ["How are you?", "And then?"])
    assert [first["read_tokens"], second["read_tokens"]] == [12, 10]
    assert [first["tokens"], second["tokens"]] == [18, 34]
    assert (first["finish_reason"], first["new_tokens"], first["chat"]) == ("length", 6, "main")
    (row,) = rows(said("How are you?\n", "-n", 6, "--json", "--stop", first["text"][2:4]))
    assert (row["text"], row["finish_reason"], row["stop_text"]) == (first["text"][:2], "stop", first["text"][2:4])


@pytest.mark.parametrize("where", ["option", "chat_template.jinja", "tokenizer_config.json"])
def test_messages_become_text_by_the_template(said, lm, model, tmp_path, where):
    path, more = model / where, []
    if where == "option":
        path, more = tmp_path / "own.jinja", ["--chat-template", tmp_path / "own.jinja"]
    path.write_text(json.dumps({"chat_template": MARKS}) if path.suffix == ".json" else MARKS)
    try:
        ran = said("Who?\nWhy?\n", "--system", "Be brief.", "-n", 6, "--json", *more)
    finally:
        path.unlink()
    assert ran.err == ""
    template = Template(MARKS, "test", {})
    assert [row["text"] for row in rows(ran)] == answers(lm, ["Who?", "Why?"], template, system="Be brief.")
    assert rows(ran)[0]["read_tokens"] == len("<system>Be brief.</s><user>Who?</s><bot>")


def test_forks_saves_and_fresh_beginnings(said, lm, tmp_path):
    path = tmp_path / "a chat.state"
    script = f"""
one
/fork other
two
/switch main
three
/save {path}
four
/reset
one
/load {path}
four
/switch
/help
"""
    ran = said(script, "-n", 6, "--json", "--state-out", tmp_path / "end.state")
    got = rows(ran)
    plain = [answers(lm, turns) for turns in (["one", "two"], ["one", "three", "four"])]
    assert [row["text"] for row in got] == [*plain[0], *plain[1][1:], plain[0][0], plain[1][2]]
    assert [row["chat"] for row in got] == ["main", "other", *["main"] * 4]
    assert "other goes on from here; /switch main goes back to main as it is now" in ran.err
    assert "* main\n  other\n" in ran.err
    assert "/fork NAME " in ran.err
    for file, turns in ((path, ["one", "three"]), (tmp_path / "end.state", ["one", "three", "four"])):
        said_so = RecurrentState.load(file).rows[0].conversation
        assert [m.content for m in said_so.messages if m.role == "user"] == turns
    (again,) = rows(said("four\n", "-n", 6, "--json", "--state-in", path))
    assert again["text"] == plain[1][2]


def test_a_file_that_is_not_a_state_is_replaced_only_where_this_was_asked_for(said, tmp_path):
    path = tmp_path / "mine"
    path.write_text("precious")
    ran = said(f"one\n/save {path}\n", "-n", 1)
    assert ran.code == 1
    assert ran.err.splitlines()[-1].endswith("is not replaced; give another name, or --overwrite")
    assert path.read_text() == "precious"
    assert said(f"one\n/save {path}\n", "-n", 1, "--overwrite").code == 0
    assert RecurrentState.load(path).rows[0].conversation


def test_a_conversation_about_a_document_that_was_read_before(said, run, words, lm, tmp_path):
    book = tmp_path / "book.state"
    assert run("prefill", *words[1:-2], "-p", "A long book. ", "-o", book).code == 0
    first, second = rows(said("Who?\n/reset\nWho?\n", "-n", 6, "--json", "--state-in", book))
    assert first["text"] == second["text"] == answers(lm, ["Who?"], state=RecurrentState.load(book))[0]
    assert (first["read_tokens"], first["tokens"]) == (4, 13 + 4 + 6)


@pytest.mark.parametrize(
    ("lines", "more", "error"),
    [
        ("/sav a\n", [], "'/sav' is not a command; there are: /save, /load, /fork, /switch, /reset, /help, /exit"),
        ("/save\n", [], "/save needs a name: /save FILE"),
        ("/save x\n", [], "nothing has been said in this conversation yet"),
        ("/load no-such.state\n", [], "no-such.state: there is no such state file"),
        ("/load {model}/config.json\n", [], "is not a whole state file"),
        ("/fork main\n", [], "there is a conversation 'main' already"),
        ("/switch other\n", [], "there is no conversation 'other'; there are: main"),
        ("/reset now\n", [], "/reset stands alone, and 'now' was given after it"),
        (b"ok\n\xff\n", ["--json", "-n", "1"], "standard input, line 2: is not UTF-8 text"),
        ("", ["--state-out", "{tmp}/x.state"], "nothing has been said in this conversation yet"),
        ("", ["--state-in", "no-such.state"], "no-such.state: there is no such state file"),
        ("", ["--chat-template", "no-such.jinja"], "no-such.jinja: the chat template cannot be read"),
        ("", ["--temperature", "1000"], "--temperature is 1000.0; allowed: 0 (greedy) to 100"),
        ("", ["--state-out", "{tmp}"], "is not a file"),
    ],
)
def test_a_mistake_in_a_script_is_one_line_and_ends_it(said, model, tmp_path, lines, more, error):
    lines = lines if isinstance(lines, bytes) else lines.format(model=model)
    ran = said(lines, *(word.format(tmp=tmp_path) for word in more))
    assert ran.code == 1
    *_, last = ran.err.splitlines()
    assert last.startswith("error: ")
    assert error in last
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("option", ["--n", "--logprobs", "--journal", "--stats-log"])
def test_what_has_no_place_in_a_conversation_is_not_an_option(said, option):
    assert f"No such option: {option}" in said("", option, "1").err


# -- a terminal --------------------------------------------------------------------------------------------------------
class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, *words: object, **env: str):
        self.seen = ""
        self.pid, self._handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.execve(PROGRAM, [str(PROGRAM), *map(str, words)], {**os.environ, "TERM": "xterm", **env})

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def until(self, pattern: str) -> str:
        """Wait for this on the screen; returns what came up to its end."""
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            try:
                data = os.read(self._handle, 4096)
            except OSError:  # it has ended
                data = b""
            assert data, self.seen
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        came, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return came

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, where the program waits: one that comes just before is seen with the next key."""
        while psutil.Process(self.pid).status() != psutil.STATUS_SLEEPING:
            pass
        self.type("\x03")

    def close(self) -> int:
        """Wait for its end; returns the exit code."""
        try:
            while os.read(self._handle, 4096):
                pass
        except OSError:
            pass
        os.close(self._handle)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


LEFT, END = "\x1b[D", "\x05"
ENDLESS = "-n", 10**7, "--logit-bias", "32=100"  # AAAA


def test_ctrl_c_stops_the_answer_and_keeps_it_and_a_second_one_leaves(words, lm, tmp_path):
    terminal = Terminal(*words, *ENDLESS, "--state-out", tmp_path / "end.state")
    terminal.until("/help shows what can be said; Ctrl-D leaves\n.*> ")
    terminal.type("Hllo" + LEFT * 3 + "e" + END + "!\n")  # edited in place
    shown = terminal.until(r"\nAAAAAAAAAA")
    terminal.type("\x03")
    shown += terminal.until(r"\(stopped\)\n.*> ")
    terminal.type("/sav x\n")
    terminal.until(r"error: '/sav' is not a command.*> ")  # and it goes on
    terminal.type("a long \\\n")
    terminal.until(r"\. ")
    terminal.type("line\n")
    terminal.until(r"\nAAAA")
    terminal.type("\x03")
    terminal.until(r"\(stopped\)\n.*> ")
    terminal.interrupt()
    assert terminal.close() == 130
    state = RecurrentState.load(tmp_path / "end.state")
    first, answer, second, more = state.rows[0].conversation.messages
    assert (first.content, second.content) == ("Hello!", "a long \nline")
    assert set(answer.content) == set(more.content) == {"A"}
    assert shown.count("A") == len(answer.content)  # what was seen is what is kept
    tokens = lm.encode(f"Hello!{answer.content}\na long \nline{more.content}")
    assert state.tokens == [len(tokens)]
    assert state.prompt_hash == lm.prefill(tokens).state.prompt_hash


def test_at_the_prompt_ctrl_c_asks_once_and_ctrl_d_leaves(words):
    terminal = Terminal(*words, "-n", 3)
    terminal.until("> ")
    terminal.type("not said")
    terminal.until("not said")
    terminal.interrupt()
    terminal.until(r"Ctrl-C again, Ctrl-D or /exit leaves\n.*> ")
    terminal.type("said\n")
    terminal.until(r"\(ended by --max-new-tokens\)\n.*> ")
    terminal.interrupt()  # the first one since a line
    terminal.until(r"Ctrl-C again, Ctrl-D or /exit leaves\n.*> ")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_leave_keeps_the_conversation(words, tmp_path, number, code):
    command = [PROGRAM, *words, *ENDLESS, "--state-out", tmp_path / "end.state"]
    with programs.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"Hello!\n")
        process.stdin.flush()
        assert process.stdout.read(10) == b"A" * 10
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(60) == code
    assert RecurrentState.load(tmp_path / "end.state").tokens[0] >= 16
