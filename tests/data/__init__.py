"""Tests of reading, splitting, templates and batches."""
