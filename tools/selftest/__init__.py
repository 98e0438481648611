"""What somebody with hardware runs first: whether all that serving needs is there, right, and as fast as it should be."""
