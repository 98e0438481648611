"""What the control plane tells of itself."""
