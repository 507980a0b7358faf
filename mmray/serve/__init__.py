"""Answers over HTTP with the predictor that scores tables: request -> items -> batches -> the same scores."""
