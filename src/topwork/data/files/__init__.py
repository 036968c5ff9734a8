"""Rows out of files: which files a source is, their encoding, and the shapes in which programs write rows."""
