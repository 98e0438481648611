"""Will it fit, how fast, on which mesh: arithmetic, and the compiler as its witness."""
