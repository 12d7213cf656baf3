"""Trains and measures one architecture: everything that runs on a worker. It knows nothing of studies."""
