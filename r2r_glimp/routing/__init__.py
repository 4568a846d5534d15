"""Routing: signals, routers, steps, policies."""
