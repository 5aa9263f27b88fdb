"""Measuring drafts: prompts and what a run of them shows."""
