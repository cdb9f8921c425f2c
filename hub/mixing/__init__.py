"""Adapters blended into one: a method of `blend` on every module, and all that is no matrix."""
