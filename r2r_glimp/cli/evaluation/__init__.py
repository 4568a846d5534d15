"""What `r2r-glimp evaluate` is made of."""
