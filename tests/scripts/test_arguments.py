"""Wrong arguments of a script end it in a line that names them, before a model is made or anything measured."""

import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
NONE = next(name for name in ("mps", "cuda") if not getattr(torch, name).is_available())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("bench_scaling.py --rows 0", "argument --rows: 0 is less than 1"),
        ("bench_scaling.py --stages 1,x", "argument --stages: 'x' is not a whole number"),
        ("bench_scaling.py --answer -1", "argument --answer: '-1' is not a whole number"),
        ("bench_scaling.py --layout rings", "argument --layout: 'rings'; there are stages and spans"),
        (
            f"bench_scaling.py --device {NONE}",
            f"argument --device: '{NONE}' is not on this machine; there are: auto, cpu",
        ),
        ("bench_decode.py --batches 0,1", "argument --batches: 0 is less than 1"),
        ("bench_decode.py --contestants that:x", "'that:x' is not KIND:DTYPE; kinds are: this, products, transformers"),
        ("bench_decode.py --prefill many", "argument --prefill: 'many' is not a whole number"),
        (f"bench_prefill.py --device {NONE}", f"argument --device: '{NONE}' is not on this machine"),
        ("bench_prefill.py --contestants this", "'this' is not KIND:DTYPE"),
        ("bench_prefill.py --memory-tokens 1,,2", "argument --memory-tokens: '' is not a whole number"),
        ("bench_grid.py --tokens 0", "argument --tokens: 0 is less than 1"),
        ("bench_uneven.py --rounds 0", "argument --rounds: 0 is less than 1"),
        ("bench_quantized.py --rows 1,,2", "argument --rows: '' is not a whole number"),
        ("bench_serving.py --slots 0", "argument --slots: 0 is less than 1"),
        ("chaos_ray.py --tiles 0", "argument --tiles: 0 is less than 1"),
        ("load_serve.py --clients 0", "argument --clients: 0 is less than 1"),
        ("quantized_quality.py --tokens few", "argument --tokens: 'few' is not a whole number"),
        ("serve_goals.py --chunk-size 0", "argument --chunk-size: 0 is less than 1"),
        ("check_on_mac.py --tile-size 0", "argument --tile-size: 0 is less than 1"),
    ],
)
def test_a_wrong_argument_is_told_in_a_line(words, says):
    script, *rest = words.split()
    done = programs.run([sys.executable, str(SCRIPTS / script), *rest], capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "")
    assert last.startswith(f"{script}: error: ")
    assert says in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a GPU to measure")
def test_decoding_is_measured_on_nvidia_gpus_alone():
    done = programs.run(
        [sys.executable, str(SCRIPTS / "bench_decode.py")], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "bench_decode.py: error: it measures kernels of NVIDIA GPUs, and torch sees none here"
    )
