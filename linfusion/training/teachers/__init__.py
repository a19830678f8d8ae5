"""Who teaches: one class a kind of pipeline."""
