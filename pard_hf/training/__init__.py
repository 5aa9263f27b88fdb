"""Adapting an ordinary causal LM into a parallel draft model."""
