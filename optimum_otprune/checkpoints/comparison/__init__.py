"""A pruned model beside the dense one: loading both, and the page that shows them."""
