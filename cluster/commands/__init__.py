"""The `grokmesh` command: a file each, with its options and what it does."""
