"""The expected needs of a run, computed before it starts."""
