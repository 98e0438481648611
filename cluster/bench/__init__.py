"""`grokmesh bench serve`: a load on a running service, measured from the client's side."""
