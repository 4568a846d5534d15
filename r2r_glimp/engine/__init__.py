"""The engine: scheduler tick, model runner, sampling, streaming."""
