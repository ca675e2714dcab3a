"""Files and data sets -> records -> token rows: the only code that knows a data format."""
