"""Saved models: written, read, described and shared."""
