"""Pruning a whole model: from calibration samples to a report."""
