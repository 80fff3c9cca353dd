"""Writes new plugins from the files in `templates/`."""
