#!/usr/bin/env python
"""Fetch a model from the Hugging Face hub, then generate from it.

    PYTHONPATH=. PYTORCH_ENABLE_MPS_FALLBACK=0 python scripts/run_hf_xlstm_metal.py

All options of `xlstm-ray generate` work too, and the Apple guide's --max_new_tokens.
"""

import argparse
import sys
from pathlib import Path

from run_local_xlstm_mps import generate

from xlstm_ray.errors import DownloadError

PROMPTS = "--prompt", "-p", "--prompt-file", "-f", "--state-in", "--resume"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo", default="NX-AI/xLSTM-7b", help="owner/name [default: %(default)s]")
    parser.add_argument("--revision", help="a branch, tag or commit [default: main]")
    parser.add_argument("--hub-cache", type=Path, help="where models are kept [default: the hub's own, see HF_HOME]")
    parser.add_argument("--offline", action="store_true", help="use only the cache")
    args, words = parser.parse_known_args()
    from xlstm_ray.hub import download

    try:
        model = download(
            args.repo, revision=args.revision, cache=args.hub_cache, offline=args.offline, bars=sys.stderr.isatty()
        )
    except DownloadError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run it again for the rest", file=sys.stderr)
        sys.exit(130)
    print(f"{args.repo} in {model}", file=sys.stderr)
    if not any(word.partition("=")[0] in PROMPTS for word in words):
        words += ["--prompt", "The capital of France is"]
    generate(["--model", str(model), *words])


if __name__ == "__main__":
    main()
