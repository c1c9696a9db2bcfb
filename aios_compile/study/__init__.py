"""Reports, dumps, certificates, ablations."""
