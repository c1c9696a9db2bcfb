"""Put first on PYTHONPATH for what a test starts: the mutant is in child processes as well."""

import os

if os.environ.get("MUTATION"):
    from tests.mutation import overlay

    overlay.install(*os.environ["MUTATION"].split("|"))
