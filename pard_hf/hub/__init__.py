"""Draft checkpoints on their way to others: what serving engines want of them, checked and written."""
