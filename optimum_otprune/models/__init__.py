"""Models of transformers: where an FFN is, how a model is run in pieces, and how it is changed."""
