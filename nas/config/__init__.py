"""What is searched and how: the keys of --set, the flags, and the plan made of them."""
