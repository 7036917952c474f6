"""The mathematics: structures of a kernel, exact factors with a certificate, least-squares fits to data."""
