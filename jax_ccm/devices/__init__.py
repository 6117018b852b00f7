"""What a device at hand does with the library: numbers, times, training, turns, and the papers' throughput."""
