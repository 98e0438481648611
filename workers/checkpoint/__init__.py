"""xAI's `ckpt-0` format: read without unpickling, streamed to devices, written."""
