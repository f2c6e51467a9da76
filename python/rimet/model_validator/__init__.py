"""Checks whether a model is written in a way that quantization gets the most out of."""
