"""Plugins in environments of their own: where those are, how one is made, what it declares, and how its stages run there."""
