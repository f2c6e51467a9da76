"""The graph of a torch model in AIMET's form."""
