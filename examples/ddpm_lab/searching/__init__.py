"""`search`, `score` and `claim`: networks found on a study's model, and whether one of them beats its rivals."""
