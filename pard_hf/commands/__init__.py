"""The commands of `pard`, one a file: its flags, and what it prints."""
