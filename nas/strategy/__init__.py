"""What to train next, and whom to stop. It knows no cluster."""
