"""What people and scripts see of a study: words, tables, live views, JSON."""
