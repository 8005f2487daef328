"""The passes of graphsurgery, one per file."""
