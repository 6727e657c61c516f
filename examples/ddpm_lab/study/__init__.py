"""`study` and `report`: methods x data sets x seeds, and their tables and pictures."""
