"""Where caches and records live, on every system and with XDG's variables."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
here, sys.platform = sys.platform, sys.argv[1]
import platformdirs  # which asks once
sys.platform = here
from xlstm_ray.directories import cache_dir, default_state_dir
print(cache_dir(), default_state_dir())
"""
CACHES = {"linux": "/home/me/.cache/xlstm-ray", "darwin": "/home/me/Library/Caches/xlstm-ray"}


def directories(system: str, **variables: str) -> list[str]:
    """The directories of caches and records, from a program that takes its system for this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    env |= {"HOME": "/home/me", **variables}
    done = subprocess.run([sys.executable, "-c", CODE, system], stdout=subprocess.PIPE, env=env, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("system", CACHES)
def test_directories_are_where_they_were_before_platformdirs(system):
    assert directories(system) == [CACHES[system], "/home/me/.local/state/xlstm-ray"]


@pytest.mark.parametrize("system", CACHES)
def test_xdg_is_honoured_alike(system):
    assert directories(system, XDG_CACHE_HOME="/c", XDG_STATE_HOME="/s") == ["/c/xlstm-ray", "/s/xlstm-ray"]


@pytest.mark.parametrize("system", CACHES)
def test_a_relative_directory_is_passed_over_as_xdg_says(system):
    """A relative one would make the place of records depend on the current folder."""
    assert directories(system, XDG_CACHE_HOME="c", XDG_STATE_HOME="s") == directories(system)
