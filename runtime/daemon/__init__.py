"""`chatvla-edge run`: a supervisor, its children, and what they tell each other."""
