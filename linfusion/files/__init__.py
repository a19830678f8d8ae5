"""Pictures and videos in and out; no diffusion is known here."""
