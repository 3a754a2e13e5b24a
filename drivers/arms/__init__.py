"""Arms, each through its vendor's own library."""
