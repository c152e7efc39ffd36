"""Which way a training set pushes the answers of a domain."""
