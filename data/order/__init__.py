"""The sample order: position -> (epoch, source, sample), and its assignment to ranks."""
