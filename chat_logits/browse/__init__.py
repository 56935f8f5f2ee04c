HOST = "127.0.0.1"  # of this machine alone
