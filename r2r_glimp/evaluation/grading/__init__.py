"""Grading: whether a text ends at a question's known answer."""
