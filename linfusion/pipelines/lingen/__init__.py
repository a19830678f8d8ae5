"""Videos of minutes by LinGen's transformer, whole or as a stream."""
