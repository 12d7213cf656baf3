"""Text and images, and what training on each means."""
