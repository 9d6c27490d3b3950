"""An "mps" device for tests on machines without one: see README.md."""
