"""Hydra multirun: running the points of a sweep, Optuna search, the table of results."""
