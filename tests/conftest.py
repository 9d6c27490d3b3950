"""Fixtures for every test."""

import logging

from metal.plugin import mps, simulator

__all__ = ["mps", "simulator"]

logging.getLogger("torch.__trace").propagate = False  # a line for every step of a compilation in each failure's report
