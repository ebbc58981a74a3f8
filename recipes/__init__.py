"""The recipes that are shipped with the launcher: a model, its data and its loss each, without training code."""
