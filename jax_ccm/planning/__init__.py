"""What a program will need on hardware that is not here: compiled for a topology, never run."""
