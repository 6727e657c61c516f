"""What one run does, as data, and how it is read from YAML."""
