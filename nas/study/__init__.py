"""A study being searched: opened, driven, swept, replayed."""
