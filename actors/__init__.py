"""What runs on Ray: the actors of the grid and the watchdog, and the executor that drives them."""
