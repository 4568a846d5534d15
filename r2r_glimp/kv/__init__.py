"""The KV manager: which blocks are free, live or remembered, and what they hold for each of the two
models."""
