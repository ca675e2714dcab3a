"""The same numbers by other libraries."""
