"""Files and texts from outside."""
