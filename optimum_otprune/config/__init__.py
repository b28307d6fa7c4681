"""What is done to a model, as names and numbers."""
