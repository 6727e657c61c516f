"""What every command needs: how mistakes are worded, folders, locks, records, progress for people."""
