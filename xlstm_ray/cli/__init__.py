"""The command line. torch is imported only inside commands, so that --help answers at once."""
