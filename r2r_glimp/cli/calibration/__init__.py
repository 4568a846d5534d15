"""What `calibrate` is made of: prompts, labels, routed measurements, and where the results go."""
