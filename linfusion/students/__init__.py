"""What a method learned, beside the base model: the format, loading and saving."""
