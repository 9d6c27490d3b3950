"""GenerationConfig: end tokens and sampling from generation_config.json. No torch here."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xlstm_ray.config import read_json
from xlstm_ray.errors import ConfigError
from xlstm_ray.sampling import Sampling

NAME = "generation_config.json"

# Keys of generation that are not supported, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": (),
}


def _ids(value: Any) -> Any:
    """eos_token_id is written as a number, a list or null; some exporters write -1 for none."""
    if value is None:
        return ()
    return tuple(n for n in (value if isinstance(value, list) else [value]) if n != -1)


class GenerationConfig(BaseModel):
    """The supported keys, with transformers' defaults. `not_served` lists other keys that would change the text."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    eos_token_id: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], BeforeValidator(_ids)] = ()
    do_sample: Annotated[bool, Field(strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, strict=True)] | None = None
    not_served: tuple[str, ...] = ()  # "key value" of keys that are not supported

    @classmethod
    def of(cls, model: Path) -> "GenerationConfig | None":
        """Read a model directory's file; None if it has none. Raises ConfigError if it cannot be read or honoured."""
        path = model / NAME
        if not path.exists():
            return None
        data = read_json(path, ConfigError)
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: must be a JSON object")
        odd = tuple(
            f"{key} {str(data[key])[:40]}"
            for key, neutral in _NEUTRAL.items()
            if data.get(key) is not None and data[key] not in neutral
        )
        try:
            return cls.model_validate({**data, "not_served": odd})
        except ValidationError as err:
            first = err.errors()[0]
            given = repr(data.get(str(first["loc"][0])))[:80]
            raise ConfigError(f"{path}: {first['loc'][0]}: {first['msg']} (given: {given})") from None

    def end_tokens(self, of_config: tuple[int, ...]) -> tuple[int, ...]:
        """This file's end tokens if it has the key, even null; else those of config.json."""
        return self.eos_token_id if "eos_token_id" in self.model_fields_set else of_config

    def sampling(self, asked: bool) -> Sampling:
        """Greedy, unless do_sample is true or sampling was asked for; do_sample without a top_k means one of 50."""
        repetition = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        if not (self.do_sample or asked):
            return Sampling(repetition_penalty=repetition)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k if self.top_k is not None else 50 if self.do_sample else 0,
            min_p=0.0 if self.min_p is None else self.min_p,
            repetition_penalty=repetition,
        )
