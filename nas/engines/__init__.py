"""Runs jobs on workers: one protocol, and an engine in this process, a pool of Ray actors, and Ray Tune."""
