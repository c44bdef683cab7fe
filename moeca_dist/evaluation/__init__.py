"""Measures of samples: against the exact ones of the same noise, and as a set against another set."""
