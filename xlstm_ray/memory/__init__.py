"""Memory: samples of what is in use, a watchdog over limits, and what a run will need."""
