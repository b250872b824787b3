"""Data sources. Nothing is imported here: each source names the extra that it needs when it is used."""
