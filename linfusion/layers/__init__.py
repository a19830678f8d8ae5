"""Which layers of which model, what is remembered on them, and exchanging their weights."""
