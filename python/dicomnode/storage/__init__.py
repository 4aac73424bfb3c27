"""Where cases rest and in which state; durable, and without a network."""
