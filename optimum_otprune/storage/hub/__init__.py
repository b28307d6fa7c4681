"""The Hub: pushing, reading, checking before the work."""
