"""Evaluation: how right, and how cheap, several systems are on the same questions."""
