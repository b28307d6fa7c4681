"""Whole-model recovery: a pruned model is trained towards the dense model it was made from."""
