"""How fast the pair is: against the hardware's limit, and against what one would use instead."""
