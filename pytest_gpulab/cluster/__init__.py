"""The embedded EKS: object store, controllers over an injected clock, and a Kubernetes API on loopback."""
