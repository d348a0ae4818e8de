"""Reports of an evaluation: printed tables, metrics.json, rank lists, attention maps and the HTML page."""
