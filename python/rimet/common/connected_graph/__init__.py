"""A model as operations and the products between them: AIMET's form of the recorded graph."""
