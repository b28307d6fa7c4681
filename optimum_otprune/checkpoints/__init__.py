"""Saved models: what is written, read, described and shared."""
