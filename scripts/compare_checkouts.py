#!/usr/bin/env python
"""Do two checkouts give the same bits? The demo model's states of three prompts, with every backend, side by side.

    git worktree add ../before COMMIT
    python scripts/compare_checkouts.py ../before .

Run it in an environment that both checkouts can use. Prompts: a short one, one of 10,000 tokens, and a batch of five
lengths. Exit code 1 if a digest differs or a checkout cannot run one of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BACKENDS = ["native", "queued_compiled_chunks", "queued_compiled_steps", "ray_compiled_chunks", "ray_compiled_steps"]
PROGRAM = "import runpy, sys; sys.argv[0] = 'xlstm-ray'; runpy.run_module('xlstm_ray', run_name='__main__')"
TEXT = "The capital of France is Paris, and the river that flows through it is the Seine. "


def prompts(folder: Path) -> dict[str, list[str]]:
    """The words of the command line that name each prompt."""
    batch = [TEXT * n for n in (1, 3, 7, 40, 2)]
    (folder / "batch.jsonl").write_text("".join(json.dumps(text) + "\n" for text in batch))
    (folder / "long").write_text(TEXT * 520)
    return {
        "short": ["--json", "--prompt", "The capital of France is"],
        "10,000 tokens": ["--json", "--prompt-file", str(folder / "long")],
        "batch": ["--jsonl", "--prompt-file", str(folder / "batch.jsonl")],
    }


def digests(checkout: Path, words: list[str], folder: Path) -> list[str]:
    """This checkout's digests: one for each row, in the rows' order."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "XLSTM_RAY_LOCAL_MODE": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM, "prefill", "--progress", "none", *words]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        return [ran.stderr.strip().splitlines()[-1][:200]]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return [row["state_digest"] for row in sorted(rows, key=lambda row: row.get("index") or 0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    args = parser.parse_args()
    model, same = args.after.resolve() / "xlstm_ray" / "demo", True
    print("| prompt | backend | before | after | |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for prompt, words in prompts(folder).items():
            for backend in args.backends.split(","):
                options = ["--model", str(model), "--device", args.device, "--chunkwise-backend", backend, *words]
                before, after = (digests(checkout, options, folder) for checkout in (args.before, args.after))
                same = same and before == after
                shown = [" ".join(d[:8] if len(d) == 64 else d for d in part) for part in (before, after)]
                print(f"| {prompt} | {backend} | {' | '.join(shown)} | {'same' if before == after else 'DIFFERS'} |")
                sys.stdout.flush()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
