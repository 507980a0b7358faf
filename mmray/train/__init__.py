"""Trains a model on Ray: survey the table -> preprocess its rows -> fit on any number of workers -> bundle."""
