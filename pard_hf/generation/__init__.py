"""Everything between `generate()` and tokens."""
