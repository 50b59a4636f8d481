"""The sample order: position -> (source, epoch, row), and the assignment of samples to ranks."""
