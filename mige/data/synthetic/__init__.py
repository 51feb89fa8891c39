"""The synthetic world: drawn subjects on drawn backgrounds, where every instruction has one exact right answer."""
