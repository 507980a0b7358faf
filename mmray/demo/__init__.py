"""The quick start: real data that comes with the package, and every step of mmray on it."""
