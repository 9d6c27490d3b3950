"""Measurements and estimates on top of the engine: bench, parity, doctor, plan."""
