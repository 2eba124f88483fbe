"""A sweep's config made into cells: base configs, their fields, and what is missing here."""
