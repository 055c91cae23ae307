"""Load from outside: what a server does under traffic, seen as its clients see it."""
