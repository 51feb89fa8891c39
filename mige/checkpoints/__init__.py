"""Official keys and their conversion, checkpoint folders, adapters."""
