"""The commands that let a service work: client prefill and ask. None of them needs torch."""

from functools import partial
from secrets import token_hex
from time import perf_counter
from typing import Annotated, Any

import typer

from xlstm_ray.cli.documents import (
    DEFAULT_URL,
    KeyOption,
    TtlOption,
    UrlOption,
    WaitOption,
    connected,
    read_document,
    sender,
)
from xlstm_ray.cli.input import piped, read_texts
from xlstm_ray.cli.options import JsonOption, ProgressOption, PromptFileOption, PromptOption, bare, examples
from xlstm_ray.cli.output import json_line, note, show, tell
from xlstm_ray.cli.reporter import Reporter
from xlstm_ray.cli.sampled import MORE, samples
from xlstm_ray.cli.states import commands as states
from xlstm_ray.client.service import Service
from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling

commands = typer.Typer(
    help="Ask a service that `xlstm-ray serve` started: read a document once, ask it many times.",
    epilog=examples("xlstm-ray client prefill --prompt-file book.txt --name book", "xlstm-ray client ask --state book"),
    no_args_is_help=True,
)
commands.add_typer(states, name="states")

ASKS = {  # what the help says of a field here
    **MORE,
    "temperature": "[default: the model's, else 1]",
    "seed": "[default: another each time]",
    "logprobs": "With --json.",
}


@commands.command(
    epilog=examples(
        "xlstm-ray client prefill --prompt-file book.txt --name book",
        "xlstm-ray client prefill --url http://10.0.0.5:8000 --api-key-file KEY --prompt-file - < book.txt",
    )
)
def prefill(
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    name: Annotated[str | None, typer.Option("--name", help=bare("The document's name. [default: a new one]"))] = None,
    ttl: TtlOption = None,
    wait: WaitOption = True,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Let a service read a document, and print its name. Ctrl-C leaves the service reading."""
    service = connected(url, api_key_file)
    prompt, prompt_file = _source(prompt, prompt_file)
    name = f"document-{token_hex(4)}" if name is None else name
    if prompt is None and prompt_file is None:
        raise UsageError("there is no document; give --prompt-file FILE ('-' for standard input) or --prompt TEXT")
    send = sender(service, name, prompt, prompt_file, ttl=ttl)
    read_document(service, name, send, wait=wait, progress=progress, json_output=json_output)


@commands.command(
    epilog=examples(
        "xlstm-ray client ask --state book --prompt ' Who is the heir?' -n 64",
        "echo 'Who is the heir?' | xlstm-ray client ask --state book --chat --json",
    )
)
@partial(samples, more=ASKS)
def ask(
    state: Annotated[
        str | None, typer.Option("--state", help=bare("The document that is asked. [default: none]"))
    ] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; the model's template is used.")
    ] = False,
    sampling: Any = None,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Ask a service, and stream its answer."""
    service = connected(url, api_key_file)
    prompt, prompt_file = _source(prompt, prompt_file)
    if prompt_file is not None:
        prompt, _ = read_texts(prompt_file, jsonl=False)
    if prompt is None and (state is None or chat):
        raise UsageError("there is no question; give --prompt TEXT or --prompt-file FILE ('-' for standard input)")
    body, n = _body(sampling, chat=chat)
    if "logprobs" in sampling and not json_output:
        raise UsageError("--logprobs is in the output of --json; add it, or leave --logprobs out")
    if prompt is not None:
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body |= {} if state is None else {"state": state}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if json_output or n > 1:
        with Reporter(progress) as report:
            report.phase("waiting")
            reply = service.post(path, body)
        for row in [reply] if json_output else reply["choices"]:
            json_line(row)
        return
    _streamed(service, path, body, Reporter(progress))


def _streamed(service: Service, path: str, body: dict[str, Any], report: Reporter) -> None:
    """Print an answer as it comes, and what it took."""
    began, first, reason = perf_counter(), None, None
    usage: dict[str, Any] = {}
    with report:
        report.phase("waiting")
        options = {"include_usage": True, "include_progress": True}
        for event in service.events(path, {**body, "stream": True, "stream_options": options}):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                reason = choice.get("finish_reason") or reason
                if text:
                    if first is None:
                        report.close()  # the text itself shows the progress
                        first = perf_counter() - began
                    show(text, end="")
            progress = event.get("progress") or {}
            if progress.get("phase") == "prefill":
                report.document(progress["tokens_done"], progress["tokens_total"], None, None)
    show("")
    seconds = perf_counter() - began
    details = usage.get("prompt_tokens_details") or {}
    known = details.get("cached_tokens") or 0
    cached = f" ({known:,} of them were known)" if known else ""
    begun = "" if first is None else f"; first token after {first:.3f} s"
    tell(
        f"prompt {usage.get('prompt_tokens', 0):,} tokens{cached}; answer {usage.get('completion_tokens', 0):,} tokens"
        f"{begun}; {seconds:.3f} s in all; ended by {reason}"
    )


def _body(sampling: dict[str, Any], *, chat: bool) -> tuple[dict[str, Any], int]:
    """Fields of sampling as those of a request, and the number of answers. Raises UsageError."""
    checked = Sampling.make(sampling)
    body = {name: value for name, value in sampling.items() if name not in ("max_new_tokens", "logprobs")}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if "logprobs" in sampling:
        likeliest = sampling["logprobs"]
        body |= {"logprobs": True, "top_logprobs": likeliest} if chat else {"logprobs": likeliest}
    return {**body, "max_tokens": checked.max_new_tokens}, checked.n


def _source(prompt: str | None, prompt_file: str | None) -> tuple[str | None, str | None]:
    """The text or the file that was given; '-' is standard input, and so is none where something is piped in."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file were both given; give one")
    if prompt == "":
        raise UsageError("the prompt is empty; give at least one token")
    if prompt == "-":
        return None, "-"
    if prompt is None and prompt_file is None and piped():
        note("the prompt is read from standard input")
        return None, "-"
    return prompt, prompt_file
