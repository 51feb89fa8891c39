"""The mathematics: schedule and loss, condition, guidance, solver."""
