"""What comes of training: each script a situation in which methods are compared."""
