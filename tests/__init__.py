"""The test suite; a package, so that helpers and equal file names can live side by side."""
