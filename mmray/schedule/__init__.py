"""Scoring again and again: what is new -> scored once -> published whole, whoever else runs at the same time."""
