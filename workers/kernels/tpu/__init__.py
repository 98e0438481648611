"""The operations for TPUs, in Pallas."""
