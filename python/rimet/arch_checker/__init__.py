"""Looks for structures in a model that run slowly, or quantize badly, on fixed-point targets."""
