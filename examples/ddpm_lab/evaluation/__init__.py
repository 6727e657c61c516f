"""`evaluate`: how far samples are from real volumes, with intervals."""
