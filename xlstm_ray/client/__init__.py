"""A service over HTTP, as who asks it sees it. Only the standard library: it starts at once."""
