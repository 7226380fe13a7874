"""Models of other libraries as their users have them, and what the package makes of them."""
