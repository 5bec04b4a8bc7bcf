"""What odd input and killed processes do."""
