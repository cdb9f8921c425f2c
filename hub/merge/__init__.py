"""Adapters into the weights of their base, on disk tensor by tensor, or on a live model."""
