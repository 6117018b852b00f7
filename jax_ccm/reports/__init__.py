"""What several commands left behind, on one page."""
