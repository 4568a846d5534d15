"""Paged attention under unmodified Hugging Face models: one registered function, backends behind
it."""
