"""Text files: YAML read as nodes with places, checked against a schema, described for editors; files written whole."""
