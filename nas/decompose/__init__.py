"""A trained model in blocks: what works together, found, checked, and run alone."""
