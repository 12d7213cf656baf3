"""The command `nas`: flags in, words and JSON out. Commands import what they need when they run."""
