"""One process a host: the actor, its worker, and the loops of leader and followers."""
