"""From a request's work to its reply: whole, or as a stream of events."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response

from xlstm_ray.engine.request import End, Event, Piece, Queued, Reading
from xlstm_ray.engine.scores import Scores
from xlstm_ray.serve.desk import DRAINING_S, Desk
from xlstm_ray.serve.fields import Body, StreamOptions
from xlstm_ray.serve.limits import Account
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.serve.replies import Form, Reply
from xlstm_ray.serve.stream import DONE, EventStream, comment, data, watching
from xlstm_ray.serve.work import Ask, Work

CACHE = "x-xlstm-cache"  # the header that says what was computed before
REPLICA = "x-xlstm-replica"  # and this one by whom, where a service has several replicas


async def reply_to(request: Request, desk: Desk, body: Body, ask: Ask, form: Form) -> Response:
    """Do what is asked and reply. The request's body must have been read. Raises Refused."""
    options = body.options()
    account = desk.account(request.scope["tenant"])
    work = Work(desk, ask, account)
    request.scope["used"] = work.used  # for the log of requests
    async with watching(request.receive, work.cancel):
        await work.begin()
        reply = Reply(form, desk.options.name, ask.echo or [""] * len(ask.prompts), ask.n)
        if body.return_token_ids:
            reply.ids = [[] if isinstance(prompt, str) else prompt or [] for prompt in ask.prompts]  # no text is left
        reply.echoes, reply.scores_prompts = ask.echo is not None, body.prompt_logprobs is not None
        if not body.stream:
            await _finish(work, reply, desk.options.ping_s)
            whole = await asyncio.to_thread(reply.whole, work.used.usage())  # a prompt's log-probabilities are many
            return JSONResponse(whole, headers=_headers(work, ask, account))
    events = _events(work, reply, options, desk.options.ping_s, scored=ask.scores is not None)
    return EventStream(events, work.cancel, _headers(work, ask, account))


def _headers(work: Work, ask: Ask, account: Account) -> dict[str, str]:
    headers = {CACHE: work.used.cache(of_state=ask.state is not None), **account.headers()}
    return headers | {REPLICA: work.used.replica} if work.used.replica else headers


async def _finish(work: Work, reply: Reply, ping_s: float) -> None:
    """Take all answers to their ends."""
    async for found in work.events(ping_s):
        if found is None:
            continue
        number, event = found
        if isinstance(event, Piece):
            reply.take(number, event)
        elif isinstance(event, End):
            refused = _failed(event)
            if refused is not None:
                work.cancel()
                raise refused
            reply.end_of(number, event)


async def _events(
    work: Work, reply: Reply, options: StreamOptions, ping_s: float, *, scored: bool
) -> AsyncIterator[str]:
    """The events of a stream: the answers' pieces, and in between what keeps their reader patient.

    What has come at once is sent at once: to send takes longer than to make a piece. scored: log-probabilities are
    wanted of the prompts that answers begin with.
    """
    counted = {"usage": None} if options.include_usage else {}
    quiet, unsent = monotonic(), ""
    waiting = set(range(len(reply.answers))) if scored else set()  # for the prompt that they begin with
    for number, said in enumerate(reply.answers):
        if said.text and not scored:
            unsent += data({**reply.echo(number), **_counted(work, options, counted)})
    async for found in work.events(ping_s):
        text = ""
        for number in sorted(waiting & _read(found, reply.n)):  # now its log-probabilities are known
            waiting.discard(number)
            echo = await asyncio.to_thread(reply.echo, number, _scores(found))  # it may be long
            unsent += data({**echo, **_counted(work, options, counted)})
        if found is None:
            text = comment("waiting")
        elif isinstance(found[1], Piece):
            chunk = reply.piece(found[0], found[1])
            text = "" if chunk is None else data({**chunk, **_counted(work, options, counted)})
        elif isinstance(found[1], End):
            refused = _failed(found[1])
            if refused is not None:
                work.cancel()
                yield unsent + data(refused.body())
                return
            reply.end_of(found[0], found[1])
            text = data({**reply.end(found[0]), **_counted(work, options, counted)})
        elif options.include_progress:
            text = data({**reply.note(progress=_progress(*found)), **counted})
        elif isinstance(found[1], Reading) and monotonic() - quiet > ping_s:
            text = comment(f"prefill {found[1].tokens_done}/{found[1].tokens_total}")
        unsent += text
        if unsent and work.waits:
            quiet = monotonic()
            yield unsent
            unsent = ""
    if options.include_usage:
        unsent += data(reply.note(usage=work.used.usage()))
    yield unsent + DONE


def _read(found: tuple[int, Event] | None, n: int) -> set[int]:
    """The answers whose prompt was read, as this event tells. n: the answers to each prompt."""
    if _scores(found) is None:
        return set()
    assert found is not None
    first = found[0] - found[0] % n
    return set(range(first, first + n))


def _scores(found: tuple[int, Event] | None) -> Scores | None:
    event = None if found is None else found[1]
    if isinstance(event, Reading):
        return event.scores
    return event.prompt_logprobs if isinstance(event, End) else None


def _counted(work: Work, options: StreamOptions, counted: dict[str, Any]) -> dict[str, Any]:
    return {"usage": work.used.usage()} if options.continuous_usage_stats else counted


def _progress(number: int, event: Event) -> dict[str, Any]:
    """How far a prompt is. index: of its first answer."""
    if isinstance(event, Reading):
        return {
            "index": number,
            "phase": "prefill",
            "tokens_done": event.tokens_done,
            "tokens_total": event.tokens_total,
        }
    assert isinstance(event, Queued)
    done = {"tokens_done": event.resumed_tokens, "tokens_total": event.prompt_tokens}
    return {"index": number, "phase": "queued", "ahead": event.ahead, **done}


def _failed(end: End) -> Refused | None:
    """Why an answer is none."""
    if end.error is not None:
        return Refused.of(end.error)
    if end.finish.reason == "cancelled":
        return Refused(503, "this service has stopped before the answer's end", code="draining", retry_s=DRAINING_S)
    return None
