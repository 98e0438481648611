"""The hot operations, behind one interface each."""
