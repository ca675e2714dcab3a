"""One module a tab: its handlers as plain functions, and `build`, which lays it out."""
