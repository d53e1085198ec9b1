"""What maintainers run, and no user needs."""
