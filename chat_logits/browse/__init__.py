HOST = "127.0.0.1"  # this machine only
