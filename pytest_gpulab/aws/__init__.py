"""Amazon EKS: one stack up, guarded while it costs, down to nothing. boto3 is imported here only, when used."""
