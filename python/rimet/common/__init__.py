"""Names that all parts of rimet share."""
