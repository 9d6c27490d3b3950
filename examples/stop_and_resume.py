"""Stop a prefill at a tile's end, save its state, and go on later, to the same bits as a run that was never stopped.

python examples/stop_and_resume.py [MODEL]        (the demo model without one)
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import xlstm_ray

TEXT = "To be, or not to be, that is the question. " * 20
OPTIONS = {"tile_size": 64, "chunk_size": 64}  # small tiles, so that there is something to stop


def main(model: str | None = None, **options: object) -> None:
    with TemporaryDirectory() as directory:
        file = Path(directory, "half.state")
        with xlstm_ray.load(model, **OPTIONS, **options) as lm:
            tiles: list[int] = []
            half = lm.prefill(TEXT, on_progress=lambda p: tiles.append(p.tiles_done), should_stop=lambda: 2 in tiles)
            half.state.save(file)
            print(f"stopped after {half.state.tokens[0]} tokens; complete: {half.complete}")
        with xlstm_ray.load(model, **OPTIONS, **options) as lm:  # as another process would, a day later
            resumed = lm.prefill(TEXT, state=xlstm_ray.RecurrentState.load(file))
            print(f"read the other {resumed.state.tokens[0] - half.state.tokens[0]} tokens")
            print("the same bits:", resumed.state.digest() == lm.prefill(TEXT).state.digest())


if __name__ == "__main__":
    main(*sys.argv[1:])
