"""The networks of the spaces as torch modules; the spaces themselves need no torch."""
