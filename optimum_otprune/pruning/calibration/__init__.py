"""Calibration samples, and passes over the model that read them."""
