"""The commands that run a model: prefill, generate."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from xlstm_ray.cli.input import PROMPT_OPTIONS, given_text, row_count
from xlstm_ray.cli.keep import (
    Saved,
    finish,
    interrupted_error,
    keeping,
    prompts_state_kept,
    require_some,
    rescued_state,
    save_state,
    snapshot_kept,
)
from xlstm_ray.cli.messages import Asked, Talk
from xlstm_ray.cli.options import (
    RUN,
    AppendFileOption,
    AppendOption,
    ChatOption,
    ChatTemplateOption,
    JsonlOption,
    JsonOption,
    MessagesOption,
    OrderedOption,
    ProgressOption,
    PromptFileOption,
    PromptLogprobsOption,
    PromptOption,
    StateInOption,
    StateOutOption,
    SystemOption,
    examples,
    takes,
)
from xlstm_ray.cli.output import json_line, show, tell
from xlstm_ray.cli.report import (
    answers_of,
    ending_text,
    first_token_text,
    print_results,
    resumed_text,
    speed_text,
    summary_of,
)
from xlstm_ray.cli.sampled import KEYS, samples
from xlstm_ray.cli.session import (
    check_generation,
    check_prompt_logprobs,
    open_engine,
    require_no_documents,
    require_no_shrinking,
    require_one_form,
    require_places,
    require_use_of_cache,
    run_under_keeper,
)
from xlstm_ray.cli.signals import stop_on_signals, stopped_by
from xlstm_ray.errors import UsageError
from xlstm_ray.settings import Settings

if TYPE_CHECKING:
    from xlstm_ray.engine.result import PrefillResult

commands = typer.Typer()


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        'xlstm-ray prefill -p "The capital of France is"',
        "xlstm-ray prefill -m DIR -f book.txt -o book.state",
        "cat book.txt | xlstm-ray prefill -m DIR --json",
    ),
)
@takes()
def prefill(
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    jsonl: JsonlOption = False,
    state_in: StateInOption = None,
    append: AppendOption = None,
    append_file: AppendFileOption = None,
    state_out: StateOutOption = None,
    prompt_logprobs: PromptLogprobsOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Compute a prompt's state and the likeliest next tokens."""
    settings = Settings.make(**asked)
    require_one_form(json_output=json_output, jsonl=jsonl)
    require_no_documents(settings)
    require_use_of_cache(settings)
    run_under_keeper(settings)
    start_from = state_in or settings.resume
    given, names, a_line_each = given_text(prompt, prompt_file, append, append_file, jsonl, start_from)
    require_places(settings, asked["config"], prompt_file or append_file, state_in, state_out)
    check_prompt_logprobs(prompt_logprobs, printed=json_output or jsonl)
    opened = open_engine(settings, state_in, state_out, asked, progress, row_count(given))
    with opened as (start, engine, report), snapshot_kept():
        a_line_each = a_line_each or ("state" in start and start["state"].batch > 1)

        def ready(b: int, of_row: "PrefillResult") -> None:
            json_line({**(names[b] if names else {"index": b}), **summary_of(engine, of_row, state_out, None)})

        with stop_on_signals(report.at_once, lambda: rescued_state(engine, state_out, settings)) as stop, report:
            on_ready = ready if a_line_each else None
            result = engine.prefill(
                **given,
                **start,
                prompt_logprobs=prompt_logprobs,
                on_progress=report.tile,
                on_ready=on_ready,
                should_stop=stop,
                on_snapshot=keeping(engine, state_out),
            )
        require_some(result, stop)
        saved = save_state(engine, result.state, state_out, settings, needed=not result.complete)
        engine.close(keep_journal=True)  # the state is saved: free memory and devices for others
        if not result.complete:
            raise interrupted_error(result, saved, stop)
        if given.get("prompt") is None and "append" not in given and a_line_each:  # only a state is given
            for b in range(result.state.batch):
                ready(b, result.row(b))
        if not a_line_each:
            print_results(engine, result, saved.asked, saved.digest, json_output=json_output)
        finish(engine, saved)


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        'xlstm-ray generate -p "The capital of France is" -n 8',
        'xlstm-ray generate -m DIR --state-in book.state --append "Who is the heir?"',
        "xlstm-ray generate -m DIR -f prompts.jsonl --jsonl > answers.jsonl",
        'xlstm-ray generate -m DIR --chat --system "Be brief." -p "Who are you?"',
        'xlstm-ray generate -p "The capital of" --top-p 0.9 --seed 7 --stop . --json --logprobs 3',
    ),
)
@takes()
@samples
def generate(
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    jsonl: JsonlOption = False,
    chat: ChatOption = False,
    messages: MessagesOption = None,
    system: SystemOption = None,
    chat_template: ChatTemplateOption = None,
    sampling: dict[str, Any] | None = None,
    state_in: StateInOption = None,
    append: AppendOption = None,
    append_file: AppendFileOption = None,
    state_out: StateOutOption = None,
    prompt_logprobs: PromptLogprobsOption = None,
    json_output: JsonOption = False,
    ordered: OrderedOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Prefill, then stream the model's answer."""
    settings = Settings.make(**asked)
    require_one_form(json_output=json_output, jsonl=jsonl)
    require_no_documents(settings)
    served = jsonl and not (state_out or settings.journal or settings.resume)  # unless it goes on from several rows
    if served and state_in is None:
        require_no_shrinking(settings)
    elif not served:
        require_use_of_cache(settings)
    run_under_keeper(settings)
    start_from = state_in or settings.resume
    said = Asked(chat, messages, system, chat_template)
    said.check((prompt, prompt_file, append, append_file, jsonl))
    if messages is None:
        given, names, a_line_each = given_text(prompt, prompt_file, append, append_file, jsonl, start_from, keys=KEYS)
    else:
        given, names, a_line_each = {"prompt": said.messages()}, [], False
    own = [{name: row.pop(name) for name in KEYS if name in row} for row in names]
    require_places(settings, asked["config"], prompt_file or append_file or messages, state_in, state_out)
    check_prompt_logprobs(prompt_logprobs, printed=json_output or jsonl)
    if ordered and not jsonl:
        raise UsageError("--ordered describes the lines of --jsonl; add it, or leave --ordered out")
    if ordered and not served:
        raise UsageError("--ordered has no effect on lines that end in one state: they are in order; leave it out")
    each = check_generation(sampling or {}, own, printed=json_output or jsonl)
    rows = sum(each) if jsonl else each[0] * (1 if messages is not None else max(1, row_count(given)))
    talk = Talk(settings, said) if said.any else None
    opened = open_engine(settings, state_in, state_out, asked, progress, rows)
    with opened as (start, engine, report), snapshot_kept():
        given = given if talk is None else talk.given(engine, given, start.get("state"))
        state = start.get("state")
        if served and (state is None or (state.batch == 1 and "append" in given)):
            require_no_shrinking(settings)
            from xlstm_ray.cli.lines import answer_lines, lines_of

            lines = lines_of(engine, given, names, sampling or {}, own, state, prompt_logprobs)
            answer_lines(engine, lines, settings, report, ordered=ordered)
            engine.close()
            finish(engine, Saved((), ""))
            return
        # All rows end in one state, so they are one batch.
        a_line_each = a_line_each or max(each) > 1 or ("state" in start and start["state"].batch > 1)
        streams = not (json_output or a_line_each)
        printed: set[int] = set()

        def answers(rows: Iterable[int]) -> None:
            """Print a line for each of these rows that has none yet."""
            new = [b for b in rows if b not in printed]
            for b, answer in zip(new, answers_of(engine, generation, new, state_out, None) if new else (), strict=True):
                printed.add(b)
                place = generation.prompts[b]
                name = names[place] if names else {"index": place}
                json_line({**name, "answer": b - generation.prompts.index(place), **answer})

        with stop_on_signals(report.at_once, lambda: rescued_state(engine, state_out, settings)) as stop, report:
            generation = engine.generate(
                **given,
                **start,
                prompt_logprobs=prompt_logprobs,
                sampling=sampling or {},
                own_sampling=own if any(own) else (),
                last=state_out is None,
                on_progress=report.tile,
                should_stop=stop,
                on_snapshot=keeping(engine, state_out),
            )
            if streams:
                report.close()  # the text itself shows the progress
            else:
                report.phase("decoding")
            stop.at = "token"
            with prompts_state_kept(engine, generation.prefill, state_out, settings):
                for pieces in generation.rows():
                    if streams:
                        show(pieces[0], end="")
                    if a_line_each:
                        answers(generation.ready)
                if a_line_each:
                    answers(generation.ready)
        result = generation.prefill
        require_some(result, stop)
        ended = bool(stop.signals)
        needed = ended or not result.complete
        with prompts_state_kept(engine, result, state_out, settings):
            state = generation.state() if needed or state_out else result.state
        saved = save_state(engine, state, state_out, settings, needed=needed)
        engine.close(keep_journal=True)
        if not result.complete:
            raise interrupted_error(result, saved, stop)
        state_out, digest = saved.asked, saved.digest
        if streams:
            show("")
            summary = summary_of(engine, result, state_out, digest)
            made = len(generation.tokens[0])
            tell(
                f"prefill {summary['prompt_tokens'] - summary['resumed_tokens']} tokens"
                f"{resumed_text(summary)} in {summary['prefill_s']:.3f} s{speed_text(summary['prefill_tok_s'])}; "
                f"decode {made} tokens in {generation.decode_s:.3f} s{speed_text(generation.decode_tok_s)}; "
                f"ended by {ending_text(generation, 0)}; "
                f"load {summary['load_s']:.1f} s; compile {summary['compile_s'] + generation.compile_s:.1f} s; "
                f"whole command {first_token_text(summary)}{summary['total_s']:.1f} s in all"
            )
            if state_out:
                tell(f"state {state_out} (digest {digest})")
        elif a_line_each:
            answers(range(len(generation.tokens)))  # the rows that were stopped
        else:
            json_line(next(answers_of(engine, generation, [0], state_out, digest)))
        if ended:
            engine.discard_journal()
            go_on = saved.go_on(without=(*PROMPT_OPTIONS, "--jsonl", "--n"), before="; ")
            raise stopped_by(f"stopped after {sum(map(len, generation.tokens))} new tokens; {saved.said}{go_on}", stop)
        finish(engine, saved)
