"""A trial as a folder that needs only torch: written, read, trained again."""
