"""The fields of Sampling as options of `generate` and `chat`, and as keys of a line of `--jsonl`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from xlstm_ray.cli.options import SAMPLING, bare
from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling

SHORT = {"max_new_tokens": "-n"}
MORE = {  # what the help says after the field's own text
    "max_new_tokens": "[default: 64]",
    "temperature": "[default: the state's, then the model's, else 0; 1 with --top-p, --top-k, --min-p or --seed]",
    "top_k": "[default: all]",
    "top_p": "[default: 1.0]",
    "min_p": "[default: 0.0]",
    "seed": "[default: 0]",
    "repetition_penalty": "[default: 1.0]",
    "presence_penalty": "[default: 0.0]",
    "frequency_penalty": "[default: 0.0]",
    "logit_bias": "Repeat it for more tokens.",
    "stop": "Repeat it for more texts.",
    "n": "It is read once; a line of JSON is printed for each answer. [default: 1]",
    "logprobs": "With --json and --jsonl.",
}
KINDS: dict[str, Any] = {"logit_bias": list[str], "stop": list[str]}
METAVAR = {"logit_bias": "ID=NUMBER", "stop": "TEXT"}
KEYS = tuple(Sampling.model_fields)


def samples(command: Callable, more: Mapping[str, str] = MORE, without: Sequence[str] = ()) -> Callable:
    """Add an option for each field to a command with the parameter `sampling`, which gets the given fields by name.

    more: what the help says after a field's own text. without: fields that the command does not take.
    """
    keys = [name for name in KEYS if name not in without]

    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in keys}
        asked = {name: value for name, value in values.items() if value is not None and value is not False}
        if "logit_bias" in asked:
            pairs = tuple(map(_bias, asked["logit_bias"]))
            asked["logit_bias"] = dict(Sampling(logit_bias=pairs).logit_bias)
        command(**given, sampling=asked)

    own = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        kind = parameter.kind
        new = [inspect.Parameter(name, kind, default=_unset(name), annotation=_option(name, more)) for name in keys]
        parameters += new if parameter.name == "sampling" else [parameter]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _option(name: str, more: Mapping[str, str]) -> Any:
    field = Sampling.model_fields[name]
    flag = "--" + name.replace("_", "-")
    kind: Any = KINDS.get(name, field.annotation)
    words = " ".join(filter(None, [field.description, more.get(name)]))
    flags = [flag, *filter(None, [SHORT.get(name)])]
    option = typer.Option(*flags, help=bare(words), metavar=METAVAR.get(name), rich_help_panel=SAMPLING)
    return Annotated[kind if kind is bool else kind | None, option]


def _unset(name: str) -> Any:
    """The value of an option that was not given."""
    return False if Sampling.model_fields[name].annotation is bool else None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"`logit_bias` is {text!r}; allowed: ID=NUMBER, a token and what its logit gains") from None
