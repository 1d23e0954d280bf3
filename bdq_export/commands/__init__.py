"""One module for each verb of the command line; each returns a frozen dataclass and prints nothing."""
