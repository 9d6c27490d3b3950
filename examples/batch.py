"""Prompts of different lengths in one call; each result is printed as soon as its group is done, the shortest first.

python examples/batch.py [MODEL]        (the demo model without one)
"""

import sys

import xlstm_ray

PROMPTS = [
    "A winter is a season. " * 30 + "The capital of Austria is",
    "The capital of Portugal is",
    "The capital of Egypt is",
]


def main(model: str | None = None, **options: object) -> None:
    with xlstm_ray.load(model, **options) as lm:

        def ready(row: int, result: xlstm_ray.PrefillResult) -> None:
            (best, *_) = lm.next_tokens(result.logits[0])
            print(f"prompt {row} of {result.state.tokens[0]} tokens goes on with {best.text!r}")

        lm.prefill(PROMPTS, on_ready=ready)


if __name__ == "__main__":
    main(*sys.argv[1:])
