"""A GPU pool on a Kubernetes cluster: brought up, waited for, and taken down again whatever happened in between.

Knows a kubeconfig and nothing of what stands behind it: the embedded cluster and EKS are the same here.
"""
