"""From YAML and the command line to objects."""
