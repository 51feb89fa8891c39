"""Contact sheets and result pages."""
