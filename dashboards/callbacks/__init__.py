"""What answers a page's controls, a file a page."""
