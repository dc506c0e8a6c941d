"""The server on Ray Serve: replicas of one app over one shared store."""
