"""The released model trained further on photographs of any shape: 1,024 or 1,008 patches, one shape a micro-batch."""

_base_ = "mige_512.py"

# Rows and columns of patches: a square, 9:7, 7:4, 16:7 and 28:9, lying and standing.
data = dict(
    shapes=[[32, 32], [28, 36], [36, 28], [24, 42], [42, 24], [21, 48], [48, 21], [18, 56], [56, 18]],
    shape_block=16,
)
