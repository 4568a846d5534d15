"""Serving: the pair behind OpenAI's HTTP protocol."""
