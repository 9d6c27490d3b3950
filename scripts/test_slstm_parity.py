#!/usr/bin/env python
"""sLSTM kernels on this machine's device against the float64 reference: `xlstm-ray parity slstm`.

Its options follow: --device cpu, --json. Exit code 1 if one is over its tolerance.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xlstm_ray.cli.app import main

sys.argv[1:1] = ["parity", "slstm"]
main()
