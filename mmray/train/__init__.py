"""Trains a model, by Ray where it takes long: survey the table -> preprocess its rows -> fit, on any number of workers.

What comes of it is a bundle.
"""
