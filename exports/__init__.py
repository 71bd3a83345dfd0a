"""Trained models as files that other programs open: what of a model is taken, and one file for each format."""
