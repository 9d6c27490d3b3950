#!/usr/bin/env python
"""Generate from a local checkpoint, with the Apple guide's words: `xlstm-ray generate` under its older name.

    PYTHONPATH=. PYTORCH_ENABLE_MPS_FALLBACK=0 python scripts/run_local_xlstm_mps.py \
        --model_path /path/to/xlstm_7b_model --prompt "The capital of France is" --max_new_tokens 64 \
        --workers 6 --heads-per-band 4

--model_path is --model and --max_new_tokens is --max-new-tokens; every other option of `xlstm-ray generate` works.
The guide's --workers is the most threads, for any number of bands, as the variable XLSTM_MPS_WORKERS is.
"""

import os
import sys
from time import perf_counter

OLDER_NAMES = {
    "--model_path": "--model",
    "--model-path": "--model",
    "--max_new_tokens": "--max-new-tokens",
}


def generate(words: list[str]) -> None:
    """Run `xlstm-ray generate` with these options, and exit as it does; then say how long all of it took."""
    started = perf_counter()
    from xlstm_ray.cli.app import main

    renamed: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        renamed.append(OLDER_NAMES.get(name, name) + equals + value)
        if renamed[-2:-1] == ["--workers"] and word.isdecimal() and int(word):
            os.environ["XLSTM_MPS_WORKERS"] = word
            del renamed[-2:]
    sys.argv = ["xlstm-ray", "generate", *renamed]
    try:
        main()
    except SystemExit as left:
        if not left.code and "--help" not in words:
            print(f"total {perf_counter() - started:.1f} s", file=sys.stderr)
        raise


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    generate(sys.argv[1:])
