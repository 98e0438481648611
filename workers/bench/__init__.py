"""`grokmesh bench engine`: how near the engine is to what the machine can do."""
