"""An engine and its parts: prompts, windows, the driver, sampling's loop, the journal, results."""
