"""Pruning: fewer layers, narrower layers, or weights that are 0; and healing what is left."""
