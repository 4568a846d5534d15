"""Abacus: the toy world the bundled pair lives in (problems, tokenizer, scoring, training)."""
