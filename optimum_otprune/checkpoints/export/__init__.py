"""A saved folder in the formats of other programs, each compared with what transformers computes."""
