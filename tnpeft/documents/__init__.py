"""Text files: YAML read as nodes with places, checked against a schema, and described for editors; atomic writing."""
