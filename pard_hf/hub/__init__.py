"""Draft checkpoints for others: checks and exports for serving engines, and model cards."""
