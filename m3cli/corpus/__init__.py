"""What the user pointed at, as ordered chunks of text. Knows nothing of models."""
