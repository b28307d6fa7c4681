"""Linear algebra that the mathematics stands on."""
