"""Evaluation by lm-eval: the model class `xlstm-ray`.

python -m xlstm_ray.integrations.lm_eval run --model xlstm-ray --model_args model=DIR --tasks TASK
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import xlstm_ray
from xlstm_ray import Request, Sampling
from xlstm_ray.engine.request import End, Handle
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.text.template import find_template

ANY_DEVICE = "cuda:0"  # what lm-eval says where nothing was said; then it is the first device that is there
AHEAD = 64  # requests that are under way at once
FIELDS = "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"  # their names are ours
NEUTRAL = "do_sample", "until", "max_gen_toks", "max_tokens", "max_new_tokens"


@register_model("xlstm-ray")
class XlstmRay(TemplateLM):
    """A loaded model, by its engine's requests. A text has no greatest length, and is never cut.

    model: as in `xlstm_ray.load`; options: its other arguments. Contexts that several continuations share are read
    once, and what contexts begin with alike (few-shot examples) is found in the tree of states. chat_template: a jinja
    file, in place of the model's own. max_gen_toks: tokens of an answer, where a task does not say.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        chat_template: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            raise UsageError("batch_size has no effect: requests are batched as they come; leave it out")
        if device not in (None, ANY_DEVICE):
            options["device"] = device
        self.engine = xlstm_ray.load(model, **{"cache_memory_mb": 256, **options})
        self._max_gen_toks = max_gen_toks
        self._template = find_template(self.engine.model_path, None if chat_template is None else Path(chat_template))

    # -- texts ---------------------------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        ends = self.engine.end_tokens
        if not ends:
            raise UsageError(f"{self.engine.model_path}: names no end token, which this task needs")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        begin = self.engine.config.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.model_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if not string:
            return []
        return self.engine.encode_more(string) if add_special_tokens is False else self.engine.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template.source if chat_template and self._template is not None else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise UsageError("this model has no chat template; give chat_template=FILE among the model's arguments")
        return self._template.render(chat_history, answer=add_generation_prompt)

    # -- requests ------------------------------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda n: requests[n][1])  # alike beginnings follow each other
        with tqdm(total=len(requests), desc="xlstm-ray: log-likelihoods", disable=disable_tqdm) as bar:
            for context, same in groupby(order, key=lambda n: requests[n][1]):
                state = self.engine.submit(Request(context, keep=True)).result().state
                asks = [(n, requests[n][2]) for n in same]
                handles = [
                    self.engine.submit(Request(append=more, state=state, prompt_logprobs=1)) if more else None
                    for _, more in asks
                ]
                for (n, more), handle in zip(asks, handles, strict=True):
                    found[n] = (0.0, True) if handle is None else _likelihood(handle.result(), more)
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
                    bar.update()
        return [found[n] for n in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in tqdm(requests, desc="xlstm-ray: texts", disable=disable_tqdm):
            (text,) = request.args
            found.append(self.engine.score(text).logprob if text else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def asked(request: Instance) -> Request:
            context, fields = request.args
            return Request(self.tok_encode(context) or [self.prefix_token_id], sampling=self._sampling(fields))

        found = []
        with tqdm(total=len(requests), desc="xlstm-ray: answers", disable=disable_tqdm) as bar:
            for request, end in zip(requests, _each(self.engine.submit, map(asked, requests)), strict=True):
                found.append(end.text)
                self.cache_hook.add_partial("generate_until", request.args, end.text)
                bar.update()
        return found

    def _sampling(self, fields: dict[str, Any]) -> Sampling:
        """A task's `generation_kwargs`. Greedy, unless it samples. Raises UsageError for what is not served."""
        odd = [name for name in fields if name not in (*FIELDS, *NEUTRAL)]
        if odd:
            raise UsageError(f"the task asks for {', '.join(odd)}, which is not served; there are: {', '.join(FIELDS)}")
        until = fields.get("until") or []
        given = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
        if not fields.get("do_sample", given.get("temperature", 0) > 0):
            given = {name: value for name, value in given.items() if name == "repetition_penalty"} | {"temperature": 0}
        if "temperature" in given:
            given["temperature"] = float(given["temperature"])
        most = next((fields[name] for name in NEUTRAL[2:] if fields.get(name) is not None), self._max_gen_toks)
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return Sampling.make({**given, "max_new_tokens": most, "stop": stop})


def _likelihood(end: End, tokens: Sequence[int]) -> tuple[float, bool]:
    """Of a continuation: the sum, and whether each token was the likeliest."""
    scores = end.prompt_logprobs
    assert scores is not None
    made = [one for one in scores if one is not None]
    best = [one.likeliest[0][0] for one in made]
    return sum(one.logprob for one in made), best == list(tokens)


def _each(submit: Callable[[Request], Handle], asks: Iterator[Request]) -> Iterator[End]:
    """The results in order, with a few requests under way."""
    under_way: deque[Handle] = deque()
    for ask in asks:
        under_way.append(submit(ask))
        if len(under_way) >= AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def main() -> None:
    """lm-eval's program, which knows this class; errors of this project are one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except XlstmRayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
