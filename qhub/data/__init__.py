"""Labelled data for models that are no language models: read lazily, turned into the inputs that a model takes."""
