"""The model card: a pure function of options and report."""
