"""A Kubernetes API over the store, on loopback, for the `kubernetes` client and kubectl."""
