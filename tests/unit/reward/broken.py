"""A reward module that does not load."""

raise RuntimeError("broken on import")
