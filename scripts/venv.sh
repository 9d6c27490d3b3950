# Sourced by scripts/run and scripts/test from the checkout's root: sets VENV to an environment with the project in it.
# EXTRAS names optional dependencies; PYTHON the interpreter (python3 by default).
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
stamp=$VENV/.installed-${EXTRAS:-base}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "xlstm-ray needs Python 3.11 or newer; set PYTHON to one" >&2; exit 1; }
  echo "installing into ${VENV} (once, a few minutes) ..." >&2
  [ -x "$VENV/bin/python" ] || ${PYTHON:-python3} -m venv "$VENV"
  "$VENV/bin/python" -m pip install -q -e ".${EXTRAS:+[$EXTRAS]}" >&2
  touch "$stamp"
fi
