#!/usr/bin/env bash
# For someone with a Mac: checks this checkout on its GPU and prints one block to paste into a report.
# Arguments: --model DIR, --lengths 512,2048,8192, --tile-size T; see scripts/check_on_mac.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
exec "$VENV/bin/python" scripts/check_on_mac.py "$@"
