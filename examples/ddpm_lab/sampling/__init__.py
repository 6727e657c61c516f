"""`sample`: volumes drawn from a base and the adapters over it."""
