"""Files, folders and the Hub: complete or not there."""
