"""WHICH WAY: from a model and a device to a ranked list of routes."""
