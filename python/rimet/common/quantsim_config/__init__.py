"""Quantsim configurations: which quantizers a target has."""
