"""Where an FFN lives in a model: architectures as data, and the one place that changes weights."""
