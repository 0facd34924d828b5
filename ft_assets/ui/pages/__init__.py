"""The web pages at /ft, beside Dagster's: one module a page, found by `declared`."""
