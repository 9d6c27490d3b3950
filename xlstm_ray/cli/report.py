"""The results of prefill and generate as they are printed."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from xlstm_ray.cli.output import json_line, show

if TYPE_CHECKING:
    from xlstm_ray.engine.decode import Made
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.engine.generation import Generation
    from xlstm_ray.engine.request import End
    from xlstm_ray.engine.result import PrefillResult, Statistics
    from xlstm_ray.engine.scores import Scores


def ending_text(generation: "Generation", b: int) -> str:
    """Why an answer ended, for people."""
    token, text, reason = generation.stop_tokens[b], generation.stop_texts[b], generation.finish_reasons[b]
    if token is not None:
        return f"the end token {token[1]!r} ({token[0]})"
    return f"the stop text {text!r}" if text is not None else {"length": "--max-new-tokens"}.get(reason, reason)


def speed_text(tokens_per_s: float | None) -> str:
    return f" ({tokens_per_s:,.0f} tokens/s)" if tokens_per_s else ""


def resumed_text(summary: dict[str, Any]) -> str:
    where = "cache" if summary["cache"]["hit_tokens"] else "state"
    return f" (and {summary['resumed_tokens']} from the {where})" if summary["resumed_tokens"] else ""


def _cache_line(use: dict[str, Any]) -> list[str]:
    """What the cache was to a prompt, where there is one."""
    if use["reason"] == "off":
        return []
    found = f"{use['hit_tokens']} tokens from {use['tier']}" if use["hit_tokens"] else "nothing"
    return [f"cache           {found}" + (f" ({use['reason']})" if use["reason"] else "")]


def summary_of(engine: "Engine", result: "PrefillResult", state_out: Path | None, digest: str | None) -> dict[str, Any]:
    """The object that --json prints. digest: the state's, if it is known."""
    stats, state = result.stats, result.state
    return {
        **_engine_of(engine),
        "prompt_tokens": stats.prompt_tokens,
        "resumed_tokens": stats.resumed_tokens,
        "cache": stats.cache(0)._asdict(),
        "mixed_numerics": state.numerics.mixed,
        "compile_s": stats.compile_s,
        "total_s": _since_start(time.time()),
        "tiles": stats.tiles,
        "tail_windows": stats.tail_windows,
        "launches": stats.launches,
        "ttft_s": stats.ttft_s,
        "ttft_command_s": None if stats.first_token_at is None else _since_start(stats.first_token_at),
        "prefill_s": stats.prefill_s,
        "prefill_tok_s": stats.prefill_tok_s,
        "tile_tok_s_median": stats.tile_tok_s_median,
        "tile_tok_s_p99": stats.tile_tok_s_p99,
        "peak_memory_bytes": stats.peak_memory_bytes,
        "peak_process_bytes": stats.peak_process_bytes,
        "peak_device_bytes": stats.peak_device_bytes,
        "restarts": stats.restarts,
        "state_path": None if state_out is None else str(state_out),
        "state_digest": digest or state.digest(),
        "next_tokens": [token._asdict() for token in engine.next_tokens(result.logits[0])],
        **prompt_logprobs_of(engine, result.prompt_logprobs),
    }


def _engine_of(engine: "Engine") -> dict[str, Any]:
    """What all results of a run have in common."""
    return {
        "model": str(engine.model_path),
        "device": str(engine.device),
        "dtype": engine.numerics.dtype,
        "dtype_reason": engine.dtype_reason,
        "backend": engine.backend.name,
        "tile_size": engine.numerics.tile_size,
        "chunk_size": engine.numerics.chunk_size,
        "t_inner": engine.t_inner if engine.backend.kernel == "compiled_steps" else None,
        "bands": engine.bands,
        "stages": engine.stages,
        "spans": engine.plan.spans,
        "layout": _layout_of(engine),
        "workers": engine.workers,
        "load_s": engine.load_s,
    }


def _layout_of(engine: "Engine") -> list[dict[str, Any]]:
    """The blocks of each stage; where `stages` was auto, also its place, as it was measured, and its need of it."""
    plan = engine.plan
    rows: list[dict[str, Any]] = [{"blocks": [s[0].blocks.start, s[0].blocks.stop - 1]} for s in plan.layout]
    for row, stage in zip(rows, plan.split or [], strict=False):
        known = bool(stage.place.block_s)  # not where there was only one place
        row |= {
            "node": stage.place.host,
            "block_s": dict(stage.place.block_s),
            "tile_s": stage.seconds if known else None,
            "need_bytes": stage.need,
            "room_bytes": stage.place.room if known else None,
        }
    return rows


def answer_of(engine: "Engine", end: "End", made: "Sequence[tuple[int, Made]]") -> dict[str, Any]:
    """The object that is printed for an answer of a service. made: its tokens with log-probabilities, if requested.

    Its seconds are the request's own: in line, to the first token, between the two, after it, and in all.
    """
    from xlstm_ray.memory.sample import peak_process_bytes

    usage, (reason, by) = end.usage, end.finish
    first, new = usage.first_token_s, len(end.tokens)
    read_s = None if first is None else first - usage.queued_s
    decode_s = None if first is None else usage.total_s - first
    read = usage.prompt_tokens - usage.resumed_tokens
    row = {
        **_engine_of(engine),
        "prompt_tokens": usage.prompt_tokens,
        "resumed_tokens": usage.resumed_tokens,
        "cache": usage.cache._asdict(),
        "queued_s": usage.queued_s,
        "ttft_s": first,
        "prefill_s": read_s,
        "prefill_tok_s": read / read_s if read and read_s else None,
        "decode_s": decode_s,
        "decode_tok_s": (new - 1) / decode_s if new > 1 and decode_s else None,
        "decode_steps": new,
        "total_s": usage.total_s,
        "peak_process_bytes": peak_process_bytes(),
        "text": end.text,
        "new_tokens": new,
        "finish_reason": reason,
        "stop_token": {"id": by, "text": engine.text_of(by)} if isinstance(by, int) else None,
        "stop_text": by if isinstance(by, str) else None,
    }
    if made:
        row["logprobs"] = [_scored(engine, token, one) for token, one in made]
    return row | prompt_logprobs_of(engine, [] if end.prompt_logprobs is None else [end.prompt_logprobs])


def _scored(engine: "Engine", token: int, made: "Made | None") -> dict[str, Any]:
    """A token with its log-probability and the likeliest ones at its place; None: nothing comes before it."""
    text, likeliest = engine.text_of, [] if made is None else made.likeliest
    top = [{"id": best, "text": text(best), "logprob": logprob} for best, logprob in likeliest]
    return {"id": token, "text": text(token), "logprob": None if made is None else made.logprob, "top": top}


def prompt_logprobs_of(engine: "Engine", rows: "Sequence[Scores]") -> dict[str, Any]:
    """The only row's tokens with their log-probabilities, if they were requested."""
    if not rows:
        return {}
    (scores,) = rows
    return {"prompt_logprobs": [_scored(engine, *one) for one in zip(scores.tokens, scores, strict=True)]}


def answers_of(
    engine: "Engine", generation: "Generation", rows: Iterable[int], state_out: Path | None, digest: str | None
) -> Iterator[dict[str, Any]]:
    """The objects that --json prints for these rows' answers; digest as in `summary_of`."""
    result, texts, tokens = generation.prefill, generation.texts, generation.tokens
    reasons, stops, stop_texts = generation.finish_reasons, generation.stop_tokens, generation.stop_texts
    for b in rows:
        of_prompt = result.row(generation.prompts[b]) if result.state.batch > 1 else result
        row = summary_of(engine, of_prompt, state_out, digest)
        row["compile_s"] += generation.compile_s
        yield {
            **row,
            "text": texts[b],
            "new_tokens": len(tokens[b]),
            "finish_reason": reasons[b],
            "stop_token": None if (token := stops[b]) is None else {"id": token[0], "text": token[1]},
            "stop_text": stop_texts[b],
            **generation.speed(b),
            **_logprobs_of(generation, b),
        }


def _logprobs_of(generation: "Generation", b: int) -> dict[str, Any]:
    """The answer's tokens with their log-probabilities, if they were requested."""
    made = generation.logprobs(b)
    if made is None:
        return {}
    rows = [{**token._asdict(), "top": [one._asdict() for one in likeliest]} for token, likeliest in made]
    return {"logprobs": rows}


def print_results(
    engine: "Engine",
    result: "PrefillResult",
    state_out: Path | None,
    digest: str | None,
    *,
    json_output: bool,
) -> None:
    summary, stats = summary_of(engine, result, state_out, digest), result.stats
    if json_output:
        json_line(summary)
        return
    s = summary
    split = f"{s['spans']} spans" if s["spans"] > 1 else f"{s['stages']} stage(s) x {s['bands']} band(s)"
    lines = [
        f"device          {s['device']} ({': '.join(filter(None, (s['dtype'], s['dtype_reason'])))})",
        f"backend         {s['backend']}, tiles of {s['tile_size']}, chunks of {s['chunk_size']}, {split}",
        f"prompt tokens   {s['prompt_tokens']}{resumed_text(s).replace('and ', '')}",
        *_cache_line(s["cache"]),
        f"first token in  {s['ttft_s']:.3f} s{speed_text(s['prefill_tok_s'])}",
        f"whole command   {first_token_text(s)}{s['total_s']:.1f} s in all",
        f"load time       {s['load_s']:.1f} s",
        f"compile time    {s['compile_s']:.1f} s",
        *_tile_line(stats),
        f"peak memory     {s['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"state           {s['state_path'] or 'not written'} (digest {s['state_digest'][:16]}...)",
        "next tokens",
        *(f"  {math.exp(t['logprob']):6.1%}  {t['text']!r} ({t['id']})" for t in s["next_tokens"]),
    ]
    show("\n".join(lines))


def _since_start(moment: float) -> float:
    """Seconds from this process's start to that time of the clock, to a hundredth."""
    if sys.platform != "linux":
        return moment - psutil.Process().create_time()
    # psutil adds the time of the machine's start, which Linux tells in whole seconds. Field 22; a name is in brackets.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return age - (time.time() - moment)


def first_token_text(summary: dict[str, Any]) -> str:
    seconds = summary["ttft_command_s"]
    return "" if seconds is None else f"{seconds:.1f} s to the first token, "


def _tile_line(stats: "Statistics") -> list[str]:
    """The speed of tiles, if there is more than one, and the launches, if they are known."""
    if stats.tiles < 2 or stats.tile_tok_s_median is None:
        return []
    tail = f", {stats.tail_windows} of them the tail's" if stats.tail_windows else ""
    line = f"tiles           {stats.tiles}{tail}: median {stats.tile_tok_s_median:,.0f} tokens/s"
    line += f", 99 % reach {stats.tile_tok_s_p99:,.0f}"
    return [line + (f"; {stats.launches:,} launches" if stats.launches is not None else "")]
