"""What every method stands on: walks, their two modes, noise, checks, trees."""
