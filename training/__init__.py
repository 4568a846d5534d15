"""Training a router on a labeled dataset: `python -m training.fit --config
configs/training/....yaml`.

Importing this package is cheap: lightning comes when a run starts.
"""
