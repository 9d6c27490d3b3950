"""Read a text once, keep its state as a small file, and ask it as often as you like.

python examples/ask_a_saved_state.py [MODEL]        (the demo model without one)
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import xlstm_ray

TEXT = "The capital of Norway is Oslo. The capital of France is Paris. The capital of Italy is Rome."
QUESTIONS = " The capital of Japan is", " The capital of Kenya is"


def main(model: str | None = None, **options: object) -> None:
    with TemporaryDirectory() as directory, xlstm_ray.load(model, **options) as lm:
        file = Path(directory, "text.state")
        lm.prefill(TEXT).state.save(file)
        print(f"{TEXT!r} is {file.stat().st_size:,} bytes of state; a longer text would be as many")
        for question in QUESTIONS:
            state = xlstm_ray.RecurrentState.load(file)  # the text itself is not read again
            print(question, *lm.generate(state=state, append=question, max_new_tokens=4), sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
