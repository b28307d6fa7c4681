"""The configuration of pruning: names and numbers."""
