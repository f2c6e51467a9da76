"""Modules for functions of torch, and their quantized twins."""
